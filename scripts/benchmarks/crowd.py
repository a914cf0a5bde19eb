"""Several pods at once."""

"""Settings: their model, and how they are found, merged and validated."""

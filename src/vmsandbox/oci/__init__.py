"""OCI documents: composing a runtime spec from an image and options, and reading specs that others wrote."""

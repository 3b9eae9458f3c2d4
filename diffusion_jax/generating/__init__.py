"""Pictures from texts and pictures, by models in files: what `make generate` does."""

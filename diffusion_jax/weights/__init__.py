"""Weights from elsewhere and back: one rename table a source, total in both directions or an error."""

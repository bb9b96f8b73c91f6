"""Functions that several test files use."""

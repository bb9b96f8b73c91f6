"""Code that yields labelled signals; no data files."""

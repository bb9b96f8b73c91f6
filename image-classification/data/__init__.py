"""Code that yields image datasets."""

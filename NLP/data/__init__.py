"""Code that yields text datasets; no data files."""

"""Code that builds environments."""

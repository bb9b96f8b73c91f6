"""Student policies."""

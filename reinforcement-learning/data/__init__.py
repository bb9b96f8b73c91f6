"""Environments, and the observations and returns that policies collect in them."""

"""Environments, and the observations and returns of policies in them."""

"""Observations and the teacher's outputs for them."""

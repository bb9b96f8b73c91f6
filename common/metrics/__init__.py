"""Metrics of quality and of cost."""

"""Metrics of quality and of cost, and the comparison with guessing."""

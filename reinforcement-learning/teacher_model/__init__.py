"""Teacher policies: networks, loading and training."""

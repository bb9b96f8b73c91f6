"""Data: reading files and the Hub, labels, splits, fingerprints."""

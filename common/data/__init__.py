"""Data: reading files and the Hub, labels, fingerprints."""

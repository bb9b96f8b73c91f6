"""The discrete key-value bottleneck, its keys, and training on cached codes."""

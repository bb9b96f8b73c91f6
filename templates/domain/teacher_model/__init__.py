"""The network, and loading of trained teachers."""

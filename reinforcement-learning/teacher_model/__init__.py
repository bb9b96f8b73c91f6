"""Teacher policies: what they are and where they come from."""

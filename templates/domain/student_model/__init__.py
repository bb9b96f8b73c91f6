"""Students: how they are trained, and what they are worth."""

"""Image students, and what ships with them."""

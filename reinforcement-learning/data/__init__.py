"""Code that collects observations and what the teacher says about them."""

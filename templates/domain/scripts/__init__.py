"""One entry point per job, its recipes, and .sh names for recipes."""

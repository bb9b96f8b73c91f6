"""One script per job, with its recipes."""

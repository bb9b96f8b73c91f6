"""One entry point per job."""

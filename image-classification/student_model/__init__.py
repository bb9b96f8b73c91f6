"""Image students, their training and its reports."""

"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input: one line that says what is wrong and what would be right. Scripts print it and exit with 2."""

"""What a command prints in one line, without a traceback."""


class UserError(ValueError):
    """Unusable settings, data or files: the message has what is wrong with its value, the limit, and what
    to do. Any other exception is a bug, and keeps its traceback."""

"""What a command prints in one line, without a traceback."""


class UserError(ValueError):
    """Unusable settings, data or files: the message has what is wrong with its value, the limit, and what
    to do. Any other exception is a bug, and keeps its traceback."""


LASTING = (UserError, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
"""Errors that the same call meets again; any other OSError may pass, as of a full disk or a store."""

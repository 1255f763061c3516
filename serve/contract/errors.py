"""What a command prints in one line, without a traceback."""

import os
import sys
from contextlib import suppress


class UserError(ValueError):
    """Unusable settings, data or files: the message has what is wrong with its value, the limit, and what
    to do. Any other exception is a bug, and keeps its traceback."""


LASTING = (UserError, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
"""Errors that the same call meets again; any other OSError may pass, as of a full disk or a store."""


def print_line(line: str) -> None:
    """Print a line on standard error. Where it cannot be written (a closed pipe or terminal, a full disk),
    the job continues without it and without those after it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # its bytes are kept: at its end Python would try again, and exit with code 120
        with suppress(OSError, AttributeError):  # a stand-in that is no file; no standard error at all
            number = sys.stderr.fileno()
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)

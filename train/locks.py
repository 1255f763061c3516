"""File locks, also on file systems without (Lustre without `-o flock`, NFS without its lock service)."""

import errno
import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

HELD = (errno.EAGAIN, errno.EACCES)  # what POSIX allows for a lock of another process
_warned: set[Path] = set()


class NoLocks(OSError):  # noqa: N818, what it is
    """The file system has no locks."""

    def warn(self, say: Callable[[str], None], where: Path, lost: str) -> None:
        """Say once for a folder what nothing prevents now: `lost`."""
        if where not in _warned:
            _warned.add(where)
            say(
                f"warning: the file system of {where} has no file locks ({self.strerror}): {lost}. Start "
                "one command at a time there, or use a file system with locks"
            )


def take(function: Callable[[IO[Any], int], None], file: IO[Any], wait: bool = False) -> bool:
    """Lock a file for this process by fcntl.flock or fcntl.lockf; False when another one has it, which with
    `wait` is waited for.

    Raises:
        NoLocks: the file system refuses locks as such.
    """
    try:
        function(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        raise NoLocks(error.errno, error.strerror) from error
    return True

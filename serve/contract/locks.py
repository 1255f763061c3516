"""File locks between processes, also on file systems that have none."""

import errno
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from serve.contract.errors import UserError

HELD = (errno.EAGAIN, errno.EACCES)  # what POSIX allows for a lock of another process
TICK = 0.2  # seconds between two attempts
_warned: set[Path] = set()


@contextmanager
def file_lock(
    path: Path,
    risk: str,
    notify: Callable[[str], None],
    seconds: float = math.inf,
    inherited: bool = False,
) -> Iterator[IO[str] | None]:
    """Hold an exclusive lock on a file, which is made if need be, for as long as the block lasts.

    Yields the open file; None where the file system has no locks (Lustre without `-o flock`, NFS without
    its lock service), after one warning for each folder. The lock goes with the process, however that
    ends.

    Args:
        risk: what nothing prevents without locks, for the warning.
        seconds: to wait for another process.
        inherited: child processes hold the lock too, until the last of them ends.

    Raises:
        UserError: another process holds the lock. OSError: the file cannot be written.
    """
    deadline, notified = time.monotonic() + seconds, False
    with open(path, "a+", encoding="utf-8") as file:
        held: IO[str] | None = file
        try:
            while not _lock(file, inherited):
                if time.monotonic() > deadline:
                    raise UserError(f"{str(path.parent)!r} is in use by another process: end that first")
                if not notified:
                    notify(f"waiting for another process that uses {path.parent}")
                notified = True
                time.sleep(TICK)
        except OSError as error:
            _warn(path.parent, error, risk, notify)
            held = None
        yield held


def is_locked(path: Path) -> bool:
    """Return whether another process holds the lock of this file."""
    with suppress(OSError), open(path, "r+", encoding="utf-8") as file:
        return not _lock(file, inherited=False)
    return False


def _lock(file: IO[Any], inherited: bool) -> bool:
    """Return whether this process has the lock now.

    Record locks (lockf), unlike those of flock and of the package filelock, are not inherited by forked
    loader processes, which may outlive a trainer that was killed.

    Raises:
        OSError: the file system has no locks.
    """
    import fcntl  # not on Windows, where models can be served

    try:
        (fcntl.flock if inherited else fcntl.lockf)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        raise
    return True


def _warn(folder: Path, error: OSError, risk: str, notify: Callable[[str], None]) -> None:
    if folder not in _warned:
        _warned.add(folder)
        notify(
            f"warning: the file system of {folder} has no file locks ({error.strerror}): {risk}. Start one "
            "command at a time there, or use a file system with locks"
        )

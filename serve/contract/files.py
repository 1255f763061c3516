"""Local files: their names as typed, how they are written whole or not at all, and their SHA-256."""

import errno
import hashlib
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from serve.contract.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
TRANSIENT = (*FULL, errno.EIO, errno.ESTALE)
"""What may be over when the same command is started again."""
MAY_PASS = {
    getattr(errno, name, errno.EIO)  # macOS has no EREMOTEIO
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "ENOTCONN", "EHOSTDOWN", "ENETDOWN", "EREMOTEIO")
    + ("ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "ENETUNREACH", "ENOMEM", "EMFILE", "ENFILE")
}
"""Of reading a local file or folder, what may be over later; network file systems report it too."""


def expand_arguments(argv: Sequence[str] | None = None) -> list[str]:
    """Return a command line, by default this process's, with the home folder in place of a leading ~ or
    ~USER of a value, also in --flag=~/photos, which shells leave as it is."""
    expanded = []
    for text in sys.argv[1:] if argv is None else argv:
        flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
        expanded.append(flag + equals + os.path.expanduser(value))
    return expanded


@contextmanager
def atomic_path(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path whose file becomes `path` when the block ends, or is removed when it fails.

    A link is written through. `folder` holds the temporary file, on the same file system; by default that
    of `path`. Errors name `path`.
    """
    path = Path(os.path.realpath(path))
    # Not named by process id: pods that share a folder all have the same one. A name has 255 bytes at most.
    temporary = (folder or path.parent) / f".{path.name[:50]}.{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        # of what has no room, the system names no file
        if error.filename == str(temporary) and error.filename2 is None:
            error.filename = str(path)
        if error.filename is None and error.errno in FULL:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(
    path: Path, mode: str = "wb", *, folder: Path | None = None, **options: Any
) -> Iterator[IO[Any]]:
    """Yield a file that becomes `path` when the block ends, and is then on the disk; see `atomic_path`.

    `options` are those of `open`; text (mode "w") is UTF-8.
    """
    if "b" not in mode:
        options = {"encoding": "utf-8", **options}
    with atomic_path(path, folder) as temporary, open(temporary, mode, **options) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(os.path.dirname(os.path.realpath(path)))


def _sync_folder(folder: str) -> None:
    """Let a rename in the folder last; mounted object stores and folders without read permission cannot."""
    try:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if error.errno in TRANSIENT:
            raise


def check_folder_writable(folder: Path, flag: str) -> None:
    """Make the folder if need be, and write a file in it that is gone at once.

    Raises:
        UserError: that cannot be done; the message names the flag. OSError: not at the moment.
    """
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        kind = OSError if error.errno in TRANSIENT else UserError
        raise kind(f"{flag}: cannot write in {str(folder)!r}: {error.strerror}") from error


def cache_folder(flag: str) -> Path:
    """Return purebred's folder for copies and caches of this user, which need not exist.

    Raises:
        UserError: the user has no home folder; the message names the flag that needs it.
    """
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # neither HOME nor an entry for this user
        raise UserError(f"{flag} needs a cache, and this user has no home: set XDG_CACHE_HOME") from error
    return Path(home) / "purebred"


def file_sha256(path: Path, size: int | None = None) -> str:
    """Return the SHA-256 of a file, or of its first `size` bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        if size is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while part := file.read(min(size, 1 << 20)):
            digest.update(part)
            size -= len(part)
        return digest.hexdigest()

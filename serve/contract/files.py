"""Files: written whole or not at all, and their sha256."""

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_writer(path: Path, scratch: Path | None = None) -> Iterator[IO[bytes]]:
    """A file that appears under its name whole, or not at all. A link is written through.

    `scratch` is the folder of the unfinished file, on the same file system; by default the file's own.
    """
    path = Path(os.path.realpath(path))
    # Not named by process id: pods that share a folder all have the same one.
    temporary = (scratch or path.parent) / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            error.filename = str(path)  # of what has no room, the system says the reason alone
        raise
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

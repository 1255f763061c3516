"""Tar files as folders: shard.tar/member.jpg names a member, which is read in place.

Tar files must not be compressed (packed.py).
"""

import hashlib
import os
import re
import stat
import tarfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError
from serve.contract.packed import describe_open

SUFFIX = ".tar"
INTO_A_TAR = re.compile(r"\.tar/", re.IGNORECASE)
MAX_HEADER_BYTES = 1 << 22
"""Of a member's name and attributes, in which macOS keeps small files; a damaged header claims anything."""
BLOCK_BYTES = tarfile.BLOCKSIZE
PADDING, AT_ONCE = 1 << 20, 1 << 16  # bytes behind the end that are looked at; tar writes some kB of zeros
Identity = tuple[int, ...]  # of a local file, until somebody changes it


class Index(NamedTuple):
    """Index of the regular members of a tar file: three numbers a member, sorted by the first."""

    names: NDArray[np.uint64]
    """Hashes of 64 bits."""
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


def list_tars(source: Path) -> list[Path]:
    """Return the tar file itself, or those of a folder, sorted."""
    return [source] if source.is_file() else sorted(source.glob(f"*{SUFFIX}"))


def split_member(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Return (tar file, member) of a path that leads into one; None for any other path."""
    text = os.fspath(path)
    for found in INTO_A_TAR.finditer(text):
        tar = text[: found.end() - 1]
        if os.path.isfile(tar):
            return tar, text[found.end() :]
    return None


def members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yield all members but folders.

    Raises:
        UserError, OSError, tarfile.TarError: the file is damaged; the members before have been yielded.
    """
    previous = -1
    with _open_tar(file) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep them all
            if member.offset <= previous or member.size < 0:
                raise UserError(f"the header at byte {member.offset} leads backwards")
            previous = member.offset
            if not member.isdir():
                yield member
        end = tar.offset
    file.seek(end)
    if not (block := file.read(BLOCK_BYTES)) or block.strip(b"\0"):
        # tarfile takes a damaged header, and the end of a file cut short, for the end
        raise UserError(f"no end mark at byte {end}: cut short or damaged, what follows is not read")
    # tar reads no further either, without a word if there are two blocks of zeros
    if any(file.read(AT_ONCE).strip(b"\0") for _ in range(PADDING // AT_ONCE)):
        raise UserError(
            f"data follow the end mark at byte {end}: if these are several tar files in one, unpack them "
            "with tar -i and pack them anew"
        )


def _open_tar(file: IO[bytes]) -> Any:  # typeshed has no TarFile.members
    try:
        return tarfile.open(fileobj=_Headers(file), mode="r:")  # type: ignore[call-overload]
    except tarfile.ReadError as error:
        name = getattr(file, "name", "")
        if packed := describe_open(file, name if isinstance(name, str) else ""):
            raise UserError(f"it is {packed}") from error
        raise


def list_members(tar: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """Return the names of the regular members, and of those that are not read: links, sparse files.

    They are in their order; of two of one name, the last one counts.

    Raises:
        UserError: damaged; the message names the tar file.
    """
    is_read: dict[str, bool] = {}
    for name, location in _members(os.fspath(tar)):
        is_read.pop(name, None)
        is_read[name] = bool(location)
    return [name for name in is_read if is_read[name]], [name for name in is_read if not is_read[name]]


def read_member(tar: str, name: str, most: int) -> bytes:
    """Return at most `most` bytes of a member, and one more if it is longer.

    Raises:
        FileNotFoundError: no such member. ValueError: the tar file is damaged. OSError: it cannot be read.
    """
    info = os.stat(tar)
    index = _index(tar, identity(info))
    key = _hash(plain(name))
    i = int(np.searchsorted(index.names, key))
    if i == len(index.names) or index.names[i] != key:
        raise FileNotFoundError(2, "no such member", f"{tar}/{name}")
    size = int(index.sizes[i])
    with open_regular(tar) as file:
        file.seek(int(index.offsets[i]))
        data = file.read(min(size, most + 1))
    if len(data) < min(size, most + 1):
        raise UserError(f"truncated: the tar file has {len(data)} of its {size} bytes")
    return data


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file, never blocking on a FIFO or a device, for which UserError is raised."""
    # opening a FIFO without a writer then returns at once; what was opened is examined
    nonblocking = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | nonblocking))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError("not a regular file")
    return file


def plain(name: str) -> str:
    """Return the name as pathlib has it: without the empty parts of ./a//b."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def file_status(path: str | os.PathLike[str]) -> os.stat_result | None:
    """Return the status of a file, or of the tar file that the path leads into; None for a missing one."""
    try:
        return os.stat(path)
    except NotADirectoryError:
        inside = split_member(path)
        return file_status(inside[0]) if inside else None
    except OSError:
        return None


def file_stamp(path: str | os.PathLike[str]) -> str:
    """Return a text that changes with the file, or with the tar file that the path leads into; "" for a
    missing one. No program sets ctime, so that a copy that keeps size and mtime has another stamp."""
    info = file_status(path)
    return ":".join(map(str, identity(info)[1:])) if info else ""  # each machine numbers its own devices


def identity(info: os.stat_result) -> Identity:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _hash(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little"))


def _members(tar: str) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yield (name, (offset, size)), or (name, None) for what is not a regular file."""
    try:
        with open_regular(tar) as file:
            for member in members(file):
                regular = member.isreg() and not member.issparse()
                yield plain(member.name), (member.offset_data, member.size) if regular else None
    except OSError:
        raise
    except Exception as error:  # tarfile raises nearly anything on damaged bytes
        raise UserError(f"{tar} cannot be read as a tar file: {error}") from error


_building: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


def _index(tar: str, version: Identity) -> Index:
    with _building[tar]:  # threads that need the same one would each read it through
        return _cached_index(tar, version)


@lru_cache(maxsize=100_000)
def _cached_index(tar: str, version: Identity) -> Index:
    last = {_hash(name): location for name, location in _members(tar)}
    found = {name: location for name, location in last.items() if location}
    names = np.array(list(found), np.uint64)
    numbers = np.array(list(found.values()), np.int64).reshape(-1, 2)
    order = np.argsort(names)
    return Index(names[order], numbers[order, 0], numbers[order, 1])


class _Headers:
    """A file of which tarfile reads headers alone, of a sane size, and not for ever at its end."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._empty_reads = 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise UserError(f"a header of {size} bytes is over the limit of {MAX_HEADER_BYTES}")
        data = self._file.read(size)
        self._empty_reads += not data
        if self._empty_reads > 9:  # in a damaged sparse map, tarfile would read nothing for ever
            raise UserError("it ends inside a header")
        return data

"""Images inside tar files (WebDataset shards too), read in place: nothing is extracted to disk.

So a member named ../../etc/passwd.jpg is a row of that name and nothing else. Tar files must not be
compressed: a compressed one has no places, only a beginning.
"""

import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from serve.inventory import PROBLEM, Entry
from serve.preprocess import MAX_FILE_BYTES, ImageError, has_image_suffix, open_nonblocking
from serve.remote import is_remote, open_seekable, read_range

MAX_HEADER_BYTES = 1 << 15
"""Of a member's name and attributes. Linux allows a path 4,096 bytes; a damaged header claims anything."""
BLOCK_BYTES = tarfile.BLOCKSIZE

KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
}


@dataclass(frozen=True)
class _Tar:
    path: str
    identity: tuple[int, ...]
    """Of the local file that was indexed; empty for a remote one."""


class Tars:
    """Indexes tar files, then reads their members by place, from any number of threads."""

    def __init__(self) -> None:
        self._tars: list[_Tar] = []

    def index(self, path: str, name: str) -> Iterator[Entry | None]:
        """An entry `name`/member for each image, None for a member of another kind.

        What is wrong with the tar file is an entry with that problem, under the tar file's own name;
        the members before the damage are listed all the same.
        """
        try:
            file, identity = _open(path)
            with file:
                self._tars.append(_Tar(path, identity))
                yield from _members(file, name, len(self._tars) - 1)
        except Exception as error:  # tarfile raises nearly anything on damaged bytes
            message = str(error) or type(error).__name__
            if isinstance(error, OSError) and error.strerror:
                message = error.strerror
            yield Entry(name, f"{PROBLEM}cannot read this tar file to its end: {message}")

    def read(self, entry: Entry) -> bytes:
        """Raises ImageError or OSError."""
        number, offset, size = map(int, entry.place.split(":"))
        tar = self._tars[number]
        read = _read_remote if is_remote(tar.path) else _read_local
        data = read(tar, offset, size)
        if len(data) != size:
            raise ImageError(f"truncated: the tar file has {len(data)} of its {size} bytes")
        return data


def _open(path: str) -> tuple[IO[bytes], tuple[int, ...]]:
    if is_remote(path):
        return open_seekable(path), ()
    file = open(path, "rb", opener=open_nonblocking)  # noqa: SIM115  closed by the caller
    info = os.fstat(file.fileno())
    if not stat.S_ISREG(info.st_mode):
        file.close()
        raise ImageError("not a regular file")
    return file, _identity(info)


def _identity(info: os.stat_result) -> tuple[int, ...]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _read_remote(tar: _Tar, offset: int, size: int) -> bytes:
    return read_range(tar.path, offset, size)


def _read_local(tar: _Tar, offset: int, size: int) -> bytes:
    with open(tar.path, "rb", opener=open_nonblocking) as file:
        if _identity(os.fstat(file.fileno())) != tar.identity:  # the place may hold another image now
            raise ImageError("the tar file has changed since it was listed")
        file.seek(offset)
        return file.read(size)


def _members(file: IO[bytes], name: str, number: int) -> Iterator[Entry | None]:
    previous = -1
    with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep them all
            if member.offset <= previous or member.size < 0:
                raise ValueError(f"the header at byte {member.offset} leads backwards")
            previous = member.offset
            if not member.isdir():
                yield _entry(member, name, number)
        end = tar.offset
    file.seek(end)
    if file.read(BLOCK_BYTES).strip(b"\0") or not file.tell() > end:
        # tarfile takes a damaged header, and the end of a file cut short, for the end
        raise ValueError(f"no end mark at byte {end}: cut short or damaged, what follows is not scored")


def _entry(member: tarfile.TarInfo, name: str, number: int) -> Entry | None:
    if not has_image_suffix(member.name):
        return None
    name = f"{name}/{member.name}".replace("\0", "\\0")
    if not member.isreg():
        kind = KINDS.get(member.type, f"a member of type {member.type!r}")
        return Entry(name, f"{PROBLEM}not a regular file but {kind} in a tar file")
    if member.issparse():
        return Entry(name, f"{PROBLEM}a sparse file in a tar file")
    if member.size == 0:
        return Entry(name, f"{PROBLEM}empty file (0 bytes)")
    if member.size > MAX_FILE_BYTES:
        return Entry(name, f"{PROBLEM}file of {member.size} bytes is over the limit of {MAX_FILE_BYTES}")
    return Entry(name, f"{number}:{member.offset_data:020}:{member.size}")


class _Headers:
    """What tarfile may read of a file: headers, of a sane size, and not for ever at its end."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._empty_reads = 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes is over the limit of {MAX_HEADER_BYTES}")
        data = self._file.read(size)
        self._empty_reads += not data
        if self._empty_reads > 9:  # in a damaged sparse map, tarfile would go on reading nothing
            raise ValueError("it ends inside a header")
        return data

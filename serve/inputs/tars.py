"""Images inside tar files (WebDataset shards too), read in place: nothing is extracted to disk.

So a member named ../../etc/passwd.jpg is a row of that name and nothing else.
"""

import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from serve import storage
from serve.contract.archive import file_stamp, identity, members, open_regular, plain
from serve.contract.errors import UserError
from serve.contract.images import size_problem
from serve.contract.listing import has_image_suffix, system_folder
from serve.contract.urls import is_remote, redact
from serve.inputs.base import LeftOut
from serve.inputs.inventory import Entry

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
    stamp: str


class Tars:
    """Indexes tar files, then reads their members by location, from any number of threads."""

    def __init__(self, left_out: LeftOut) -> None:
        self._tars: list[_Tar] = []
        self.left_out = left_out

    def index(self, path: str, name: str) -> Iterator[Entry]:
        """Yield an entry `name`/member for each image; other members and system folders are left out.

        What is wrong with the tar file is an entry with that problem, under the tar file's own name;
        the members before the damage are listed all the same.

        Raises:
            OutageError: it cannot be read now: the members behind would have no rows.
        """
        try:
            stamp = _stamp(path)
            file, mark = _open(path)
            with file:
                self._tars.append(_Tar(path, mark, stamp))
                for member in members(file):
                    if folder := system_folder(plain(member.name)):
                        self.left_out.system.add(f"{name}/{folder}")
                    elif not has_image_suffix(member.name):
                        self.left_out.count(member.name)
                    else:
                        yield _entry(member, name, len(self._tars) - 1)
        except storage.OutageError:
            raise
        except Exception as error:  # tarfile raises nearly anything on damaged bytes
            message = redact(error) or type(error).__name__
            if isinstance(error, OSError) and error.strerror:
                message = error.strerror
            if storage.is_outage(error):
                raise storage.OutageError(f"{redact(path)} cannot be read to its end: {message}") from error
            yield Entry(name, problem=f"cannot read this tar file to its end: {message}")

    def stamp(self, entry: Entry) -> str:
        """The tar file's own: its members change with it."""
        return self._tars[int(entry.location.partition(":")[0])].stamp

    def read(self, entry: Entry) -> bytes:
        """Raises UserError or OSError."""
        number, _, offset, size = map(int, entry.location.split(":"))
        tar = self._tars[number]
        remote = is_remote(tar.path)
        data = storage.read_range(tar.path, offset, size) if remote else _read(tar, offset, size)
        if len(data) != size:
            raise UserError(f"truncated: the tar file has {len(data)} of its {size} bytes")
        return data


def _stamp(path: str) -> str:
    if not is_remote(path):
        return file_stamp(path)
    with suppress(OSError):  # why it cannot be read, reading says better
        return storage.stat(path).stamp
    return ""


def _open(path: str) -> tuple[IO[bytes], tuple[int, ...]]:
    if is_remote(path):
        return storage.open_seekable(path), ()
    file = open_regular(path)
    return file, identity(os.fstat(file.fileno()))


def _read(tar: _Tar, offset: int, size: int) -> bytes:
    with open_regular(tar.path) as file:
        if identity(os.fstat(file.fileno())) != tar.identity:  # the place may hold another image now
            raise UserError("the tar file has changed since it was listed")
        file.seek(offset)
        return file.read(size)


def _entry(member: tarfile.TarInfo, name: str, number: int) -> Entry:
    """Of members of one name the last sorts last by its location, whatever it is, as `tar -x` leaves it."""
    location = f"{number}:{member.offset:020}:{member.offset_data}:{member.size}"
    name = f"{name}/{plain(member.name)}".replace("\0", "\\0")
    return Entry(name, location, problem=_problem(member))


def _problem(member: tarfile.TarInfo) -> str:
    if not member.isreg():
        kind = KINDS.get(member.type, f"a member of type {member.type!r}")
        return f"not a regular file but {kind} in a tar file"
    if member.issparse():
        return "a sparse file in a tar file"
    return size_problem(member.size)

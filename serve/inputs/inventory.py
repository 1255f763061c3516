"""A sorted list of any number of inputs that costs next to no memory: sorted on disk, read in order.

A list of a million Python strings is 100 MB, and more while it is sorted. Here the names are sorted in
stretches, merged into one temporary file without a name, and read from it as they are needed.
"""

import hashlib
import heapq
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import IO, NamedTuple

from serve.contract.errors import UserError

STRETCH = 50_000  # records sorted in memory at once
STRIDE = 256  # records from one known position in the file to the next
BLOCK = 1 << 16  # bytes read at once

FIELDS = 4  # of a record: key, name if it is another, location, problem; each ends with NUL


class Entry(NamedTuple):
    """One input: it gets exactly one row."""

    name: str
    """Path in its row: relative to what was given, with forward slashes."""
    location: str = ""
    """Where its source finds it, beyond the name: a URL with its secrets, a position in a tar file."""
    key: str = ""
    """What it is sorted by, and the same for each spelling of one input's name; "": the name."""
    problem: str = ""
    """Why it is known to be unreadable."""


def printable(name: str) -> str:
    """Return the name as every format writes it: bytes that are not UTF-8 become backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


Same = Callable[[Entry, Entry], bool]


class NamesDigest:
    """sha256 over names in their order, as a reader of the output can compute it again."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str) -> None:
        self._hash.update(name.encode("utf-8", "backslashreplace") + b"\0")

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class Inventory:
    """Entries sorted by key (code points), each input once. Made by `Inventory.sort`."""

    def __init__(self, file: IO[bytes], length: int, size: int, positions: "array[int]", repeated: int):
        self._file = file
        self._length = length
        self._size = size
        self._positions = positions  # of every STRIDE-th record
        self.repeated = repeated
        """Entries left out because another of the same input was kept (the one that sorts last)."""

    def __len__(self) -> int:
        return self._length

    @classmethod
    def sort(cls, entries: Iterable[Entry], same: Same = lambda a, b: True) -> "Inventory":
        """Sort on disk; `same` decides whether two entries of one key are one input.

        Raises UserError for a name that no file can have, OSError when there is no room on disk.
        """
        positions, size, length, repeated = array("Q"), 0, 0, 0
        file = tempfile.TemporaryFile(prefix="inventory-")  # noqa: SIM115  read as long as we live
        for record, repeats in _last_of_each_input(_sorted_records(entries), same):
            if length % STRIDE == 0:
                positions.append(size)
            file.write(record)
            size += len(record)
            length += 1
            repeated += repeats
        file.flush()
        return cls(file, length, size, positions, repeated)

    def entries(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Yield those numbered start to stop - 1, read as they are consumed."""
        stop = self._length if stop is None else min(stop, self._length)
        if start >= stop:
            return
        number = start - start % STRIDE
        for record in _records(self._file.fileno(), self._positions[start // STRIDE], self._size):
            if number >= stop:
                return
            if number >= start:
                yield _decode(record)
            number += 1

    def digest(self) -> str:
        names = NamesDigest()
        for entry in self.entries():
            names.add(entry.name)
        return names.hexdigest()


def _encode(entry: Entry) -> bytes:
    # surrogatepass keeps the order of code points, which surrogateescape would not
    if "\0" in entry.name:
        raise UserError(f"the name {entry.name!r} has a NUL character, which no file can have")
    key = entry.key or entry.name
    beyond = (field.replace("\0", " ") for field in (entry.location, entry.problem))
    fields = (key, "" if key == entry.name else entry.name, *beyond, "")
    return "\0".join(fields).encode("utf-8", "surrogatepass")


def _decode(record: bytes) -> Entry:
    key, name, location, problem = record.decode("utf-8", "surrogatepass").split("\0")[:FIELDS]
    return Entry(name or key, location, key if name else "", problem)


def _sorted_records(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Sort by external merges. A record sorts by its key: NUL is below every character of a key."""
    stretch: list[bytes] = []
    runs: list[tuple[int, int]] = []
    spill: IO[bytes] | None = None
    for entry in entries:
        stretch.append(_encode(entry))
        if len(stretch) == STRETCH:
            spill = spill or tempfile.TemporaryFile(prefix="inventory-")  # noqa: SIM115
            start = runs[-1][1] if runs else 0
            stretch.sort()
            spill.writelines(stretch)
            runs.append((start, start + sum(map(len, stretch))))
            stretch = []
    stretch.sort()
    if spill is None:
        yield from stretch
        return
    with spill:
        spill.flush()
        sorted_runs = (_records(spill.fileno(), start, end) for start, end in runs)
        yield from heapq.merge(*sorted_runs, stretch)


def _last_of_each_input(records: Iterable[bytes], same: Same) -> Iterator[tuple[bytes, int]]:
    """Yield (record, how many of the same input were left out before it)."""
    kept: dict[bytes, int] = {}  # of one key: nearly always one
    key = b""
    for record in records:
        if record[: record.index(b"\0") + 1] != key:
            yield from kept.items()
            kept, key = {}, record[: record.index(b"\0") + 1]
        repeats = [kept.pop(other) + 1 for other in list(kept) if same(_decode(other), _decode(record))]
        kept[record] = sum(repeats)
    yield from kept.items()


def _records(descriptor: int, start: int, end: int) -> Iterator[bytes]:
    """Yield the records between two positions; `pread` shares the file with other readers."""
    rest = b""
    while start < end:
        data = os.pread(descriptor, min(BLOCK, end - start), start)
        assert data, "the file is shorter than what was written"
        start += len(data)
        *fields, rest = (rest + data).split(b"\0")
        whole = len(fields) // FIELDS * FIELDS
        rest = b"\0".join((*fields[whole:], rest))  # the next block has what is missing
        for i in range(0, whole, FIELDS):
            yield b"%s\0%s\0%s\0%s\0" % tuple(fields[i : i + FIELDS])

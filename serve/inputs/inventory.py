"""A sorted list of any number of inputs that costs next to no memory: SQLite sorts it on disk.

A list of a million Python strings is 100 MB, and more while it is sorted. Here the names are in a temporary
database without a name, and are read from it as they are needed.
"""

import errno
import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from serve.contract.errors import UserError

BLOCK = 256  # rows read at once


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


def digest_names(names: Iterable[str]) -> str:
    """Return the sha256 over names in their order, as a reader of the output can compute it again."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(printable(name).encode() + b"\0")
    return digest.hexdigest()


class Inventory:
    """Entries sorted by key (code points), each input once. Made by `Inventory.sort`."""

    def __init__(self, database: sqlite3.Connection, length: int, repeated: int):
        self._database = database
        self._length = length
        self.repeated = repeated
        """Entries left out because another of the same input was kept (the one that sorts last)."""

    def __del__(self) -> None:
        self._database.close()  # at once: a connection is part of a cycle of references

    def __len__(self) -> int:
        return self._length

    @classmethod
    def sort(cls, entries: Iterable[Entry], same: Same = lambda a, b: True) -> "Inventory":
        """Sort on disk; `same` decides whether two entries of one key are one input.

        Raises UserError for a name that no file can have, OSError when there is no room on disk.
        """
        database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = OFF")  # nobody reads it after a crash
            database.execute("CREATE TABLE found (record BLOB)")
            database.execute("CREATE TABLE inputs (record BLOB)")
            database.execute("BEGIN")
            records = ((_encode(entry),) for entry in entries)
            found = database.executemany("INSERT INTO found VALUES (?)", records).rowcount
            ordered = database.execute("SELECT record FROM found ORDER BY record")
            kept = database.executemany(
                "INSERT INTO inputs VALUES (?)", _last_of_each_input(ordered, same)
            ).rowcount
            database.execute("COMMIT")
            database.execute("DROP TABLE found")
        except sqlite3.OperationalError as error:
            reason = f"the list of inputs cannot be sorted in the temporary folder: {error}"
            raise OSError(errno.ENOSPC, reason) from error
        return cls(database, kept, found - kept)

    def entries(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Yield those numbered start to stop - 1, read as they are consumed."""
        stop = self._length if stop is None else min(stop, self._length)
        query = "SELECT record FROM inputs WHERE rowid > ? AND rowid <= ?"
        for first in range(start, stop, BLOCK):
            for (record,) in self._database.execute(query, (first, min(first + BLOCK, stop))).fetchall():
                yield _decode(record)

    def digest(self) -> str:
        return digest_names(entry.name for entry in self.entries())


def _encode(entry: Entry) -> bytes:
    """Return a record that sorts by its key: NUL is below every character of a key."""
    if "\0" in entry.name:
        raise UserError(f"the name {entry.name!r} has a NUL character, which no file can have")
    key = entry.key or entry.name
    beyond = (field.replace("\0", " ") for field in (entry.location, entry.problem))
    fields = (key, "" if key == entry.name else entry.name, *beyond)
    # surrogatepass keeps the order of code points, which surrogateescape would not
    return "\0".join(fields).encode("utf-8", "surrogatepass")


def _decode(record: bytes) -> Entry:
    key, name, location, problem = record.decode("utf-8", "surrogatepass").split("\0")
    return Entry(name or key, location, key if name else "", problem)


def _last_of_each_input(records: Iterable[tuple[bytes]], same: Same) -> Iterator[tuple[bytes]]:
    for _, of_one_key in groupby(records, lambda row: row[0].partition(b"\0")[0]):
        kept: list[tuple[bytes]] = []  # nearly always one
        for row in of_one_key:
            kept = [other for other in kept if not same(_decode(*other), _decode(*row))] + [row]
        yield from kept

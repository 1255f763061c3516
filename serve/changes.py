"""Whether inputs are still what was scored: what --resume keeps must be answers to the present images.

A manifest has two digests of its rows' inputs. Stamps (a local file's size, times and number, an object's
ETag) are compared at once. Where they differ, which a copy on another machine does too, the files are read
again and their contents compared, which costs less than scoring them. URLs of a list have no stamps.
"""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice

from serve.contract.errors import print_line
from serve.inputs.base import Read
from serve.inputs.inventory import Entry
from serve.inputs.sources import Source
from serve.shards import Manifest

READERS = 32  # threads that wait for storage
STAMPS_AT_ONCE = 256  # by one thread


class SetDigest:
    """sha256 of a set of named values, in whatever order they come; the digests of two sets add up to that
    of both."""

    def __init__(self) -> None:
        self._sum = 0
        self._lock = threading.Lock()

    def add(self, name: str, value: bytes) -> None:
        self.add_digest(hashlib.sha256(name.encode("utf-8", "surrogatepass") + b"\0" + value).hexdigest())

    def add_digest(self, digest: str) -> None:
        with self._lock:
            self._sum = (self._sum + int(digest, 16)) % 2**256

    def hexdigest(self) -> str:
        return f"{self._sum:064x}"


def digesting(read: Read, contents: SetDigest) -> Read:
    """Return `read`, which adds what it reads to `contents`."""

    def digest_and_read(entry: Entry) -> bytes:
        data = read(entry)
        contents.add(entry.name, hashlib.sha256(data).digest())
        return data

    return digest_and_read


def digest_stamps(source: Source, rows: range) -> str:
    total = SetDigest()

    def add(entries: list[Entry]) -> None:
        for entry in entries:
            total.add(entry.name, source.stamp(entry).encode("utf-8", "surrogatepass"))

    entries = source.inventory.entries(rows.start, rows.stop)
    with ThreadPoolExecutor(READERS) as pool:  # on a network file system each look takes a while
        while blocks := [b for _ in range(READERS) if (b := list(islice(entries, STAMPS_AT_ONCE)))]:
            for _ in pool.map(add, blocks):
                pass
    return total.hexdigest()


def unchanged(source: Source, manifest: Manifest) -> bool:
    """Return whether the inputs of a part or piece are what was scored; prints a line if not."""
    rows = range(manifest.first, manifest.first + manifest.rows)
    if manifest.stamps == digest_stamps(source, rows):
        return True
    if manifest.contents == _digest_contents(source, rows):
        return True
    print_line(
        f"images of rows {rows.start} to {rows.stop - 1} may have changed since they were scored: "
        "these rows are scored again"
    )
    return False


def _digest_contents(source: Source, rows: range) -> str:
    contents = SetDigest()
    read = digesting(source.read, contents)

    def read_one(entry: Entry) -> None:
        with suppress(Exception):  # then it could not be read before, or it is not the same
            read(entry)

    entries = source.inventory.entries(rows.start, rows.stop)
    with ThreadPoolExecutor(READERS) as pool:
        while block := list(islice(entries, READERS)):
            for _ in pool.map(read_one, block):
                pass
    return contents.hexdigest()

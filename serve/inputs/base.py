"""What each kind of input provides. A new kind is a file beside this one, and a line in sources.py."""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from serve import storage
from serve.contract.archive import file_stamp, plain
from serve.contract.errors import UserError
from serve.contract.formats import kind_of_other
from serve.contract.images import read_image_file
from serve.contract.urls import is_remote, unsigned
from serve.inputs.inventory import Entry

Read = Callable[[Entry], bytes]


@dataclass
class LeftOut:
    """Files and folders that are no inputs, counted while inputs are listed."""

    others: Counter[str] = field(default_factory=Counter)
    """How many files have no image suffix, by `kind_of_other`."""
    system: set[str] = field(default_factory=set)
    """Paths of system folders (@eaDir, lost+found, ...)."""
    folders: int = 0
    """How many folders a pattern without ** matches."""

    def count(self, name: str) -> None:
        self.others[kind_of_other(name)] += 1


class Inputs(ABC):
    """Images that one value of --images names."""

    def __init__(self, base: str = ""):
        """`base`: folder that names are relative to, of entries whose location is no URL."""
        self.base, self.left_out = base, LeftOut()

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """Yield the inputs in any order, perhaps some of them twice."""

    def read(self, entry: Entry) -> bytes:
        """Return the bytes of an entry without a problem; called from several threads.

        Raises:
            UserError, OSError
        """
        if is_remote(entry.location):
            return storage.read_object(entry.location)
        return read_image_file(os.path.join(self.base, entry.name))

    def stamp(self, entry: Entry) -> str:
        """Return a text that is another one when the file was changed or replaced; "" where that is not
        known (URLs that were not listed by their store)."""
        return "" if is_remote(entry.location) else file_stamp(os.path.join(self.base, entry.name))

    def is_same(self, one: Entry, other: Entry) -> bool:
        """Return whether two entries of one key are one input.

        Raises:
            UserError: they are URLs, and nothing that a row may show distinguishes them.
        """
        if is_remote(one.location) and is_remote(other.location):
            if unsigned(one.location) != unsigned(other.location):
                raise UserError(
                    "two URLs differ in a secret only, so that their rows would have one name, "
                    f"{one.name!r}: score them in two calls"
                )
            return True
        paths = [os.path.join(self.base, entry.name) for entry in (one, other)]
        if absolute(paths[0]) == absolute(paths[1]):
            return True
        try:  # an accent in one code point or in two: some file systems make no difference
            return os.path.samefile(*paths)
        except OSError:
            return False


def absolute(path: str) -> str:
    """Return an absolute path without ./ and //, but with .., which may follow a link."""
    return "/" + plain(os.path.join(os.getcwd(), path))

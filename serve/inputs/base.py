"""What each kind of input provides. A new kind is a file beside this one, and a line in sources.py."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from serve.contract.formats import kind_of_other
from serve.inputs.inventory import Entry

Read = Callable[[Entry], bytes]


@dataclass
class LeftOut:
    """Files and folders that are no inputs, counted while inputs are listed."""

    others: Counter[str] = field(default_factory=Counter)
    """How many files have no image suffix, by `kind_of_other`."""
    system: set[str] = field(default_factory=set)
    """Paths of system folders (@eaDir, lost+found, ...)."""

    def count(self, name: str) -> None:
        self.others[kind_of_other(name)] += 1


class Inputs(ABC):
    """Images that one value of --images names."""

    def __init__(self) -> None:
        self.left_out = LeftOut()

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """Yield the inputs in any order, perhaps some of them twice."""

    @abstractmethod
    def read(self, entry: Entry) -> bytes:
        """Return the bytes of an entry without a problem; called from several threads.

        Raises:
            ImageError, OSError
        """

    @abstractmethod
    def stamp(self, entry: Entry) -> str:
        """Return a text that is another one when the file was changed or replaced; "" where that is not
        known (URLs that were not listed by their store)."""

    def is_same(self, one: Entry, other: Entry) -> bool:
        """Return whether two entries of one key are one input."""
        return True

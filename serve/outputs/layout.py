"""Rows of predictions, and what a format must provide to write them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError
from serve.contract.looks import Look

BYTES_OF_A_PROBABILITY = 13  # in CSV, with its comma
LARGE_OUTPUT = 2 * 10**9  # bytes


@dataclass(frozen=True, slots=True)
class Row:
    """The outcome for one input: probabilities or an error, never both."""

    path: str
    probabilities: NDArray[np.float32] | None = None
    """float32 [num_classes]."""
    error: str = ""
    transient: bool = False
    """The error may pass: the file may be readable later."""
    embedding: NDArray[np.float32] | None = None
    """float32 [features], with --embeddings."""
    doubt: str = ""
    """What looks wrong about the picture that was scored."""
    look: Look | None = None


@dataclass(frozen=True)
class Layout:
    """What a row holds in every format.

    Path; label and probability of the likeliest class; the probabilities of all classes or of the `top_k`
    likeliest; the embedding; the error, which is empty (in JSON and Parquet null) beside a prediction.
    """

    class_names: tuple[str, ...]
    top_k: int = 0
    """0: the probabilities of all classes, in the model's order."""
    embeddings: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.top_k <= len(self.class_names):
            raise UserError(f"--top-k {self.top_k} is outside 0 (all) to {len(self.class_names)} (classes)")

    @property
    def columns(self) -> list[str]:
        """Columns of CSV and Parquet between the first probability and the embedding."""
        if not self.top_k:
            return [f"probability_{name}" for name in self.class_names]
        return [f"{kind}_{rank}" for rank in range(2, self.top_k + 1) for kind in ("label", "probability")]

    def warn_of_size(self, rows: int) -> str:
        """Return a warning when the probabilities of all classes make a very large file, else ""."""
        size = BYTES_OF_A_PROBABILITY * len(self.class_names) * rows
        if self.top_k or size < LARGE_OUTPUT:
            return ""
        return (
            f"warning: the probabilities of all {len(self.class_names)} classes make about "
            f"{size / 1e9:.0f} GB in text; --top-k 5 writes the likeliest classes"
        )

    def likeliest(self, probabilities: NDArray[np.float32]) -> list[int]:
        """Return class numbers, the likeliest first; of equal ones the first class, as argmax does."""
        if self.top_k <= 1:
            return [int(probabilities.argmax())]
        return [int(i) for i in np.argsort(-probabilities, kind="stable")[: self.top_k]]


class Writer:
    """Writes rows to a file, which stays open."""

    def write(self, row: Row) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Write what is held back."""


class Joiner:
    def add(self, part: Path) -> Iterator[str]:
        """Copy the rows of a part, and yield their names. Memory is one row or row group.

        Raises:
            UserError: its columns are not those of the parts before it.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Write what is held back."""


@dataclass(frozen=True)
class Format:
    """One way to write rows to a file. A new one is a file beside this one and a line in formats.py."""

    name: str
    """As given to --format."""
    suffix: str
    """Suffix of parts and of the default output."""
    open_writer: Callable[[IO[bytes], Layout], Writer]
    begins: Callable[[IO[bytes]], bool]
    """Whether a file begins as one that this format's writer made: other files are not replaced."""
    other_suffixes: tuple[str, ...] = ()
    """Suffixes of --output that choose this format, beside its own."""
    open_joiner: Callable[[IO[bytes]], Joiner] | None = None
    """None: parts cannot be joined, so there are no shards and nothing can be resumed."""
    embeddings: bool = False
    """Whether a row can hold a vector."""
    check_installed: Callable[[], Any] = lambda: None
    """Raises UserError when a library is missing."""


def are_columns(names: Sequence[str]) -> bool:
    """Return whether these are the columns of CSV or Parquet, or the fields of an object of JSON Lines."""
    between = ("embedding", "top", "probabilities")
    return (
        list(names[:3]) == ["path", "label", "probability"]
        and list(names[-1:]) == ["error"]
        and all(name in between or name.startswith(("probability_", "label_")) for name in names[3:-1])
    )

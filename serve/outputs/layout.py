"""What a row of predictions holds, whatever the format."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError


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
    """float32 [features], when asked for."""
    doubt: str = ""
    """What looks wrong about the picture that was scored."""


@dataclass(frozen=True)
class Layout:
    """What a row holds."""

    class_names: tuple[str, ...]
    top_k: int = 0
    """0: the probabilities of all classes, in the model's order."""
    embeddings: bool = False
    labels: bool = False
    """Kaggle: the number of the likeliest class instead of a probability."""

    def __post_init__(self) -> None:
        if not 0 <= self.top_k <= len(self.class_names):
            raise UserError(f"top_k {self.top_k} is outside 0 (all) .. {len(self.class_names)} classes")

    @property
    def columns(self) -> list[str]:
        """Of CSV and Parquet, between probability and error, the embedding apart."""
        if not self.top_k:
            return [f"probability_{name}" for name in self.class_names]
        return [f"{kind}_{rank}" for rank in range(2, self.top_k + 1) for kind in ("label", "probability")]

    def likeliest(self, probabilities: NDArray[np.float32]) -> list[int]:
        """Class numbers, the likeliest first; of equal ones the first class first, as argmax takes it."""
        if self.top_k <= 1:
            return [int(probabilities.argmax())]
        return [int(i) for i in np.argsort(-probabilities, kind="stable")[: self.top_k]]


class Writer(Protocol):
    def write(self, row: Row) -> None: ...

    def close(self) -> None:
        """Write what is held back. The file stays open."""

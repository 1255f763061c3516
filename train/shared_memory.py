"""Arrays that all processes of a machine have one copy of, and strings as such arrays.

Of a list of a million strings every process has its own million objects; of these arrays it has a view.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from train.distributed import Ranks, gather_list


class Texts(Sequence[str]):
    """Many strings, file names that are no valid UTF-8 too, one after the other in an array of bytes."""

    def __init__(self, data: NDArray[np.uint8], ends: NDArray[np.int64]):
        """`ends` [N]: where each string ends in `data`."""
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        if isinstance(texts, Texts):
            return texts
        encoded = [os.fsencode(text) for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.data[start : int(self.ends[index])].tobytes())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list has none


def share(arrays: Sequence[NDArray[Any]], ranks: Ranks, folder: Path) -> list[NDArray[Any]]:
    """The same arrays, of which the processes of this machine have one copy: a file in `folder` that they
    map, and that is gone when all of them do. Every rank must call it with equal arrays.

    A process that cannot (a full disk) keeps its own copy.
    """
    if ranks.world_size == 1:
        return list(arrays)
    written = Path()
    if ranks.local_rank == 0:
        written = _write(arrays, folder)
    folders = gather_list([str(written)], ranks)
    shared = _map(arrays, Path(folders[ranks.rank - ranks.local_rank][0]))  # torchrun's ranks of a machine
    gather_list([True], ranks)  # all have mapped
    if written != Path():
        shutil.rmtree(written, ignore_errors=True)
    return shared


def _write(arrays: Sequence[NDArray[Any]], folder: Path) -> Path:
    """An empty path when there is no room."""
    home = Path()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        home = Path(tempfile.mkdtemp(prefix="shared-", dir=folder))
        for number, array in enumerate(arrays):
            np.save(home / f"{number}.npy", array)
    except OSError as error:
        print(f"warning: each process keeps its own list of the images: {error}", flush=True)
        if home != Path():
            shutil.rmtree(home, ignore_errors=True)
        return Path()
    return home.resolve()


def _map(arrays: Sequence[NDArray[Any]], home: Path) -> list[NDArray[Any]]:
    if home == Path():
        return list(arrays)
    try:
        # copy on write: pages are shared until somebody writes, which nobody does
        return [
            np.load(home / f"{number}.npy", mmap_mode="c").view(np.ndarray) if array.size else array
            for number, array in enumerate(arrays)
        ]
    except (OSError, ValueError):
        return list(arrays)

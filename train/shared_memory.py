"""Arrays of which the processes of a machine have one copy, and strings packed into such arrays."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.distributed import Ranks, gather_list


class Texts(Sequence[str]):
    """Strings (no slices, no negative indices), packed into one array; `ends` [N]: where each one ends."""

    def __init__(self, data: NDArray[np.uint8], ends: NDArray[np.int64]):
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Pack strings; file names that are no valid UTF-8 are kept as they are."""
        encoded = [os.fsencode(text) for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.data[start : int(self.ends[index])].tobytes())


def share(arrays: Sequence[NDArray[Any]], ranks: Ranks, folder: Path) -> list[NDArray[Any]]:
    """Return equal arrays that the processes of this machine have one copy of: files in `folder` which they
    map, and which are deleted at once. A process that cannot map them keeps its own arrays.

    Every rank must call it, with equal arrays.
    """
    if ranks.world_size == 1:
        return list(arrays)
    written = _write(arrays, folder) if ranks.local_rank == 0 else ""
    names = [part[0] for part in gather_list([written], ranks)]
    name = names[ranks.rank - ranks.local_rank]  # torchrun numbers the ranks of a machine in a row
    shared = _map(arrays, Path(name)) if name else list(arrays)
    gather_list([True], ranks)  # all have mapped
    if written:
        shutil.rmtree(written, ignore_errors=True)
    return shared


def _write(arrays: Sequence[NDArray[Any]], folder: Path) -> str:
    """Return the new folder; empty when there is no room."""
    home = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        home = tempfile.mkdtemp(prefix="shared-", dir=folder.resolve())
        for number, array in enumerate(arrays):
            np.save(Path(home, f"{number}.npy"), array)
    except OSError as error:
        print(f"warning: each process keeps its own list of the images: {error}", flush=True)
        if home:
            shutil.rmtree(home, ignore_errors=True)
        return ""
    return home


def _map(arrays: Sequence[NDArray[Any]], home: Path) -> list[NDArray[Any]]:
    try:
        # copy on write: pages are shared until somebody writes, which nobody does
        return [
            np.load(home / f"{number}.npy", mmap_mode="c").view(np.ndarray) if array.size else array
            for number, array in enumerate(arrays)
        ]
    except (OSError, ValueError):
        return list(arrays)

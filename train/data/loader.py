"""Loader: batches of pixels and labels, read by worker processes, or by threads of this process."""

import atexit
import errno
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from serve.contract.errors import UserError
from train.data.augment import ImageAugment
from train.data.index import ImageSet
from train.data.pixel_cache import PixelCache
from train.data.reading import Pixels
from train.data.sampler import Key
from train.data.workers import PREFETCH, fetch_in_thread, init_worker, kill_workers, map_in_threads


@dataclass(frozen=True)
class Batch:
    images: Tensor  # uint8 [N, H, W, 3]
    labels: Tensor  # int64 [N]
    weights: Tensor  # float32 [N], 0 or 1
    indices: Tensor  # int64 [N], in the ImageSet
    lost: tuple[tuple[str, str], ...] = ()
    """Files that cannot be read any more, and why; their weight is 0."""

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = (self.images, self.labels, self.weights, self.indices)
        images, labels, weights, indices = map(function, tensors)
        return Batch(images, labels, weights, indices, self.lost)


@dataclass(eq=False)
class PixelDataset(Dataset[Batch]):
    """Data set whose items are whole batches: keys [(epoch, index, weight)] -> Batch."""

    images: ImageSet
    seed: int
    augment: ImageAugment | None
    """None takes the pixels of `load` or the cache as they are, all of one size."""
    load: Callable[[Path], Pixels]
    """Decodes a file to the pixels that a cache holds: a cache must not change what is learnt."""
    cache: PixelCache | None = None
    """Of these images; without one, files are decoded."""
    side: int = 64
    """Of the grey square in place of an image that cannot be read, in pixels."""

    def __post_init__(self) -> None:
        assert self.cache is None or len(self.cache) == len(self.images)

    def __getitem__(self, keys: Sequence[Key]) -> Batch:
        epochs, indices, _ = zip(*keys, strict=True)
        originals, lost = self._read(indices)
        if self.augment is None:
            pixels = np.stack(originals)
        else:
            assert len(set(epochs)) == 1
            pixels = self.augment(originals, self.seed, epochs[0], indices)
        return self.batch(keys, torch.from_numpy(pixels), lost)

    def batch(self, keys: Sequence[Key], images: Tensor, lost: Mapping[int, tuple[str, str]]) -> Batch:
        """Return the batch of these images; `lost` are files that cannot be read, with the reasons."""
        _, indices, weights = zip(*keys, strict=True)
        weights = tuple(0.0 if i in lost else w for i, w in zip(indices, weights, strict=True))
        return Batch(
            images,
            torch.from_numpy(self.images.labels[list(indices)]),
            torch.tensor(weights, dtype=torch.float32),
            torch.tensor(indices),
            tuple(lost[index] for index in sorted(lost)),
        )

    def _read(self, indices: Sequence[int]) -> tuple[list[Pixels], dict[int, tuple[str, str]]]:
        """Return the images, and index -> (path, reason) of those that are grey as they cannot be read."""
        lost: dict[int, tuple[str, str]] = {}
        if self.cache is not None:
            return [self.cache[index] for index in indices], lost

        def decode(index: int) -> Pixels:
            path = self.images.root / self.images.paths[index]
            try:
                return self.load(path)
            except (OSError, ValueError) as error:
                if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                    raise  # not the file's fault
                lost[index] = (str(path), str(error))
                return np.full((self.side, self.side, 3), 128, np.uint8)

        return map_in_threads(decode, indices), lost


class HangError(UserError):
    """No batch came in time; a thread or process may be stuck in reading."""


class Loader:
    """Loader of the batches of one data set, whose worker processes live as long as it.

    Args:
        hang_seconds: after which a batch that does not come is an error.
    """

    def __init__(
        self, dataset: PixelDataset, num_workers: int, pin_memory: bool, hang_seconds: float = math.inf
    ):
        self.dataset, self.num_workers, self.hang_seconds = dataset, num_workers, hang_seconds
        self.while_waiting: Callable[[], None] = lambda: None
        """Called once a second while a batch does not come; may raise."""
        self.waited = 0.0
        """Seconds in which the training process had to wait for batches. Work on the device is no part of
        it: when its queue is full, launching takes as long as earlier launches run."""
        self.lost: dict[str, str] = {}
        """Files that this rank could not read any more, and why."""
        self.sampler = _Sampler()
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,  # an item of the data set is a batch
            sampler=self.sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            prefetch_factor=PREFETCH if num_workers else None,
            worker_init_fn=init_worker,
            # Python 3.14's forkserver would give each worker a copy of the index; fork shares its memory
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        )

    def __call__(self, batches: Iterable[list[Key]]) -> Iterator[Batch]:
        """Yield the batches of these keys.

        Raises:
            HangError: a batch did not come in time.
        """
        self.sampler.batches = batches
        loaded: Iterator[Batch] = iter(self.loader)
        if self.loader.pin_memory:
            loaded = _on_device(loaded, torch.cuda.current_device())
        fetched = fetch_in_thread(loaded, self._wait)
        while True:
            started = time.perf_counter()
            batch = next(fetched, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            self.sampler.awaited.popleft()
            for path, why in batch.lost:
                if path not in self.lost:
                    print(f"warning: {path} was readable before training and is not now: {why}", flush=True)
                    self.lost[path] = why
            yield batch

    def with_augment(self, augment: ImageAugment) -> "Loader":
        """Return a loader of the same images and cache, augmented in another way."""
        dataset = replace(self.dataset, augment=augment)
        new = Loader(dataset, self.num_workers, self.loader.pin_memory, self.hang_seconds)
        new.lost = self.lost
        return new

    def exit_codes(self) -> list[int]:
        """Return the exit codes of worker processes that have failed; -N if signal N ended one."""
        iterator = getattr(self.loader, "_iterator", None)  # torch offers no other way
        return [worker.exitcode for worker in getattr(iterator, "_workers", ()) if worker.exitcode]

    def _wait(self, seconds: float) -> None:
        self.while_waiting()
        if seconds < self.hang_seconds:
            return
        images, cache = self.dataset.images, self.dataset.cache
        source = str(images.root if cache is None else cache.file)
        if cache is None and self.sampler.awaited:
            _, index, _ = self.sampler.awaited[0][0]
            source += f" ({images.paths[index]!r}, or another image of its batch)"
        raise HangError(
            f"no batch came for {self.hang_seconds / 60:g} minutes (--hang-minutes): reading from {source} "
            "hangs. Check that this storage answers; if it is only slow, raise --hang-minutes"
        )


class _Sampler:
    """Sampler of a DataLoader whose batches are set for each epoch."""

    batches: Iterable[list[Key]] = ()

    def __init__(self) -> None:
        self.awaited: deque[list[Key]] = deque()
        """Batches that were requested and have not come, the next one first."""

    def __iter__(self) -> Iterator[list[Key]]:
        self.awaited.clear()
        for batch in self.batches:
            self.awaited.append(batch)
            yield batch


def _on_device(batches: Iterator[Batch], device: int) -> Iterator[Batch]:
    """Yield the same batches, pinned for this device in any thread: each thread has its current one."""
    torch.cuda.set_device(device)
    yield from batches


# Workers ignore the SIGTERM by which multiprocessing ends its children, and it would wait for them.
atexit.register(kill_workers)

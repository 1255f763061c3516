"""Plan an epoch and load its batches; both are functions of (seed, epoch), whatever the processes."""

import atexit
import errno
import math
import multiprocessing
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from serve.contract.errors import UserError
from serve.contract.preprocess import Preprocess
from train.data.augment import View
from train.data.index import ImageSet
from train.data.pixel_cache import PixelCache
from train.data.random_numbers import seed_of
from train.data.reading import read_image
from train.data.threads import in_threads
from train.data.workers import PREFETCH, begin_worker, in_thread

Key = tuple[int, int, float]  # (epoch, index in the ImageSet, weight)


@dataclass(frozen=True)
class EpochPlan:
    """Which samples form which batch on which rank.

    Each sample has weight 1 exactly once an epoch. The last batch is completed with samples of weight
    0, so that all batches have one shape and no rank is ever without work.
    """

    num_samples: int
    batch_size: int
    """Of one optimizer step, over all ranks and accumulation steps."""
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    def __post_init__(self) -> None:
        parts = self.world_size * self.accumulation
        if self.batch_size % parts:
            raise UserError(
                f"--batch_size {self.batch_size} is not divisible by {parts} "
                f"({self.world_size} processes x {self.accumulation} accumulation steps)"
            )
        assert self.num_samples > 0
        assert 0 <= self.rank < self.world_size

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.num_samples // self.batch_size)

    @property
    def micro_batch_size(self) -> int:
        """Images in one forward pass of this rank."""
        return self.batch_size // (self.world_size * self.accumulation)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the samples' order in an epoch: a permutation of range(num_samples), 8 bytes a sample."""
        return np.random.default_rng(seed_of("order", self.seed, epoch)).permutation(self.num_samples)

    def offset(self, step: int, micro_step: int) -> int:
        """Place in the epoch of the first image of this rank's micro batch."""
        part = self.rank * self.accumulation + micro_step
        return step * self.batch_size + part * self.micro_batch_size

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[list[Key]]:
        """This rank's micro batches from `first_step` on, in order."""
        order = self.order(epoch)
        for step in range(first_step, self.steps):
            for micro_step in range(self.accumulation):
                start = self.offset(step, micro_step)
                places = np.arange(start, start + self.micro_batch_size)
                indices = order[places % self.num_samples].tolist()
                weights = (places < self.num_samples).astype(float).tolist()
                yield [(epoch, index, weight) for index, weight in zip(indices, weights, strict=True)]

    def samples(self, epoch: int, step: int) -> list[int]:
        """Indices of the samples of weight 1 in the whole batch of this step, of all ranks."""
        places = np.arange(self.real_size(step)) + step * self.batch_size
        samples: list[int] = self.order(epoch)[places].tolist()
        return samples

    def real_size(self, step: int) -> int:
        """Samples of weight 1 in the whole batch of this step."""
        return min(self.batch_size, self.num_samples - step * self.batch_size)


@dataclass(frozen=True)
class Batch:
    images: Tensor  # uint8 [N, H, W, 3]
    labels: Tensor  # int64 [N]
    weights: Tensor  # float32 [N], 0 or 1
    indices: Tensor  # int64 [N], in the ImageSet
    lost: tuple[tuple[str, str], ...] = ()
    """Files that cannot be read any more, and why; their weight is 0."""

    def to(self, device: torch.device) -> "Batch":
        parts = (self.images, self.labels, self.weights, self.indices)
        images, labels, weights, indices = (part.to(device, non_blocking=True) for part in parts)
        return Batch(images, labels, weights, indices, self.lost)

    def pin_memory(self) -> "Batch":
        parts = (self.images, self.labels, self.weights, self.indices)
        images, labels, weights, indices = (part.pin_memory() for part in parts)
        return Batch(images, labels, weights, indices, self.lost)


def read_pixels(path: Path) -> NDArray[np.uint8]:
    return np.asarray(read_image(path))


class PixelDataset(Dataset[Batch]):
    """Batches of (epoch, index, weight) -> pixels and labels.

    Args:
        transform: None takes what the cache holds as it is.
        cache: of these images; without one, files are decoded.
        load: reads of a file what the cache would hold: a cache must not change what is learnt.
    """

    def __init__(
        self,
        images: ImageSet,
        seed: int,
        transform: View | Preprocess | None,
        cache: PixelCache | None = None,
        load: Callable[[Path], NDArray[np.uint8]] = read_pixels,
    ):
        assert transform is not None or cache is not None
        assert cache is None or len(cache) == len(images)
        self.images, self.seed, self.transform = images, seed, transform
        self.cache, self.load = cache, load

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        epochs, indices, weights = zip(*keys, strict=True)
        lost: dict[int, tuple[str, str]] = {}
        originals = self._originals(indices, lost)
        weights = tuple(0.0 if i in lost else w for i, w in zip(indices, weights, strict=True))
        if isinstance(self.transform, View):
            assert len(set(epochs)) == 1
            pixels = self.transform(originals, self.seed, epochs[0], indices)
        elif self.transform is not None:
            pixels = np.stack(in_threads(self.transform, map(Image.fromarray, originals)))
        else:
            pixels = np.stack(originals)
        return Batch(
            torch.from_numpy(pixels),
            torch.from_numpy(self.images.labels[list(indices)]),
            torch.tensor(weights, dtype=torch.float32),
            torch.tensor(indices),
            tuple(lost[index] for index in sorted(lost)),
        )

    def _originals(
        self, indices: Sequence[int], lost: dict[int, tuple[str, str]]
    ) -> list[NDArray[np.uint8]]:
        """A file that cannot be read any more is noted in `lost`, and a grey picture takes its place."""
        if self.cache is not None:
            return [self.cache[index] for index in indices]

        def decode(index: int) -> NDArray[np.uint8]:
            path = self.images.root / self.images.paths[index]
            try:
                return self.load(path)
            except (OSError, ValueError) as error:
                if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                    raise  # no fault of the file's
                lost[index] = (str(path), str(error))
                return np.full((64, 64, 3), 128, np.uint8)

        return in_threads(decode, indices)


def _on_device(batches: Iterator[Batch], device: int) -> Iterator[Batch]:
    """Yield the same batches, pinned for this device in any thread: each thread has its current one."""
    torch.cuda.set_device(device)
    yield from batches


def _as_it_is(batch: Any) -> Any:
    return batch


class _Keys:
    """A batch sampler whose batches are set for each epoch."""

    def __init__(self) -> None:
        self.batches: Iterable[list[Key]] = ()
        self.awaited: deque[list[Key]] = deque()
        """Those that were asked for and have not come, the next one first."""

    def __iter__(self) -> Iterator[list[Key]]:
        self.awaited.clear()
        for keys in self.batches:
            self.awaited.append(keys)
            yield keys


class Hang(UserError):  # noqa: N818, what it is
    """A batch did not come in time; some thread or process may be stuck in reading for ever."""


class Loader:
    """Loads the batches asked for, in worker processes that live as long as the loader.

    Args:
        hang_seconds: after which a batch that has not come ends the run.
    """

    def __init__(
        self, dataset: PixelDataset, num_workers: int, pin_memory: bool, hang_seconds: float = math.inf
    ):
        _open_loaders.add(self)
        self.images, self.cache, self.hang_seconds = dataset.images, dataset.cache, hang_seconds
        self.while_waiting: Callable[[], None] = lambda: None
        """Called once a second while a batch does not come; may raise."""
        self.lost: dict[str, str] = {}
        """Files that this rank could not read any more, and why."""
        self.keys = _Keys()
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self.keys,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            prefetch_factor=PREFETCH if num_workers else None,
            worker_init_fn=begin_worker,
        )

    def __call__(self, batches: Iterable[list[Key]]) -> Iterator[Batch]:
        """
        Raises:
            Hang: a batch did not come in time.
        """
        self.keys.batches = batches
        loaded: Iterator[Batch] = iter(self.loader)
        if self.loader.pin_memory:
            loaded = _on_device(loaded, torch.cuda.current_device())
        for batch in in_thread(loaded, self._wait):
            self.keys.awaited.popleft()
            for path, why in batch.lost:
                if path not in self.lost:
                    print(f"warning: {path} was readable before training and is not now: {why}", flush=True)
                    self.lost[path] = why
            yield batch

    def exit_codes(self) -> list[int]:
        """Of those loader processes that have ended; negative: minus the signal that ended it."""
        iterator = getattr(self.loader, "_iterator", None)  # torch shows them nowhere else
        return [worker.exitcode for worker in getattr(iterator, "_workers", ()) if worker.exitcode]

    def _wait(self, seconds: float) -> None:
        self.while_waiting()
        if seconds < self.hang_seconds:
            return
        first = self.images.paths[self.keys.awaited[0][0][1]] if self.keys.awaited else "its first image"
        read = f"{first!r} and the other images of its batch from {self.images.root}"
        if self.cache is not None:
            read = f"the pixel cache {self.cache.file}"
        raise Hang(
            f"no batch came for {self.hang_seconds / 60:g} minutes (--hang-minutes): whoever was to read "
            f"{read} hangs. See whether that storage answers; if it is only slow, raise --hang-minutes"
        )


_open_loaders: "weakref.WeakSet[Loader]" = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """They ignore the SIGTERM by which multiprocessing ends its children, and would be waited for."""
    for loader in list(_open_loaders):
        del loader.loader  # its iterator tells the workers to end
    for child in multiprocessing.active_children():  # of an iterator that an error's traceback holds
        child.kill()


def kill_workers() -> None:
    """End the loader processes at once, also those that are stuck."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their end as an error
    for child in multiprocessing.active_children():
        child.kill()


def evaluation_batches(
    num_samples: int, batch_size: int, rank: int, world_size: int
) -> Iterator[list[Key]]:
    """Every sample once over all ranks, none twice: no padding, so that sums are exact."""
    mine = range(rank, num_samples, world_size)
    for start in range(0, len(mine), batch_size):
        yield [(0, index, 1.0) for index in mine[start : start + batch_size]]

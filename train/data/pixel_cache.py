"""Pixel cache: a file of decoded images that every rank maps into memory, so that loading is a slice.

An entry is an image by the sha256 of its file: runs on the same images, in any order, share one cache.
Only images above the cache's size are made smaller; the others are stored as they decode.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contract.errors import UserError
from serve.contract.images import FORMATS, Decode, load_whole, open_image, read_image_file
from serve.contract.locks import file_lock
from serve.contract.orientation import on_its_side
from serve.contract.scaling import LEAST_RATIO, Size
from serve.processors import available_processors
from train.config import TrainConfig
from train.data.index import ImageSet
from train.data.reading import DECODER, FILTER, ChangedError, Pixels, Shrink, read_image
from train.distributed import Log

T = TypeVar("T")


FORMAT = 2  # of the entries, and of what files decode to
MOST_OF_FREE_SPACE = {"auto": 0.25, "on": 0.95, "device": 0.95}
LARGEST_ENLARGED = 2.0  # times the input: what the smallest random crops are cut from


@dataclass(frozen=True)
class Entries:
    """Recipe by which images become entries."""

    settings: Mapping[str, Any]
    """All that decides the pixels, plain values."""
    size: Callable[[Size], Size]
    """Size of an entry, from the image's upright size."""
    pixels: Callable[[Image.Image], Pixels]
    decode: Decode = load_whole
    """As in `load_image`."""

    def load(self, path: Path, sha256: str = "") -> Pixels:
        """Return the entry of a file; raises as `read_image` does."""
        return self.pixels(read_image(path, self.decode, sha256))


@dataclass(frozen=True)
class PixelCache:
    """Images of a data set, mapped from `file`: read-only uint8 [H, W, 3], not copied."""

    file: Path
    offsets: NDArray[np.int64]
    """[N] of an image's first byte."""
    sizes: NDArray[np.int32]
    """[N, 2] width, height."""

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Pixels:
        offset, (width, height) = int(self.offsets[index]), self.sizes[index].tolist()
        return self.bytes[offset : offset + 3 * width * height].reshape(height, width, 3)

    @cached_property
    def bytes(self) -> NDArray[np.uint8]:
        """The whole file."""
        return np.memmap(self.file, np.uint8, "r").view(np.ndarray)

    def __getstate__(self) -> dict[str, Any]:  # a worker process maps the file anew
        return {name: value for name, value in self.__dict__.items() if name != "bytes"}


def training_entries(config: TrainConfig) -> Entries:
    """Return the recipe of training images: with a shorter side of at most `cache_size`, or else so large
    that the smallest random crop is not enlarged (to at most twice the input).

    Lanczos' filter makes them smaller, for any preprocessing: each crop is resized once more, and two
    passes of a softer one would train on blurred images and validate on sharp ones.
    """
    preprocess = config.preprocess()
    needed = max(preprocess.resize_size, preprocess.size)
    if config.crop_scale < 1:
        enlarged = min(LARGEST_ENLARGED, 1 / math.sqrt(config.crop_scale))
        needed = max(needed, math.ceil(config.input_size(config.image_size) * enlarged))
    shrink = Shrink(config.cache_size or needed)
    settings = {"short_side": shrink.short_side, "interpolation": FILTER, "least_ratio": LEAST_RATIO}
    settings |= {"profiles": preprocess.profiles}
    return Entries(settings, shrink.size, shrink, shrink.decode)


def validation_entries(config: TrainConfig) -> Entries:
    """Return the recipe of validation images: the very pixels that are validated."""
    preprocess = config.preprocess()
    size = partial(_fixed_size, preprocess.size)
    return Entries({"preprocess": preprocess.to_dict()}, size, preprocess, preprocess.decode)


def _fixed_size(side: int, original: Size) -> Size:  # no lambda: processes that are spawned get a copy
    return side, side


def open_cache(folder: Path, images: ImageSet, entries: Entries, mode: str, log: Log) -> PixelCache | None:
    """Return the cache of these images, built first if need be.

    It is None when an image cannot be read any more, and with auto also when the disk is too full or cannot
    be written. Processes that need the same cache at the same time build it once.

    Raises:
        UserError: mode is on and the cache cannot be written, or an image has changed since the scan.
    """
    sha256s, first = np.unique(np.array(images.sha256), return_index=True)
    settings = json.dumps({"format": FORMAT, "decoder": DECODER, **entries.settings}, sort_keys=True)
    key = hashlib.sha256("\n".join([settings, *sha256s]).encode()).hexdigest()[:16]
    home = folder / f"pixels-{key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        risk = "trainings that start at the same time decode all images each"
        with file_lock(home.with_suffix(".lock"), risk, log) as lock:
            sizes = _read_sizes(home)
            if sizes is None:
                files = {images.root / images.paths[i]: images.sha256[i] for i in first}
                sizes = _build(home, files, entries, MOST_OF_FREE_SPACE[mode], log, lock is not None)
    except ChangedError as error:
        raise UserError(
            f"{error}: start again; if that ends in the same way, the file system keeps no time of change: "
            f"delete {folder}/scan-*.json"
        ) from error
    except OSError as error:
        reason = f"no pixel cache can be kept in {folder}: {error.strerror or error}"
        if mode != "auto":
            raise UserError(
                f"{reason}; free some space, choose another --output, lower --cache-size, or use "
                "--pixel-cache off"
            ) from error
        log(f"warning: {reason}; images are decoded in every epoch")
        return None
    except _UnreadableError as error:
        log(f"warning: no pixel cache, images are decoded in every epoch: {error}")
        return None
    rows = np.searchsorted(sha256s, np.array(images.sha256))
    return PixelCache(home / "pixels.u8", _offsets(sizes)[rows], sizes[rows])


def _read_sizes(home: Path) -> NDArray[np.int32] | None:
    """Return the entries' sizes [N, 2]; None when the cache is missing or not whole."""
    try:
        sizes: NDArray[np.int32] = np.load(home / "sizes.npy", allow_pickle=False)
        whole = (home / "pixels.u8").stat().st_size == max(1, _offsets(sizes)[-1])
        return sizes if whole else None
    except (OSError, ValueError):
        return None


def _offsets(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the entries' first bytes and the end of the last one, [N + 1]."""
    return np.append(0, (3 * sizes.astype(np.int64).prod(axis=1)).cumsum())


def _build(
    home: Path, files: Mapping[Path, str], entries: Entries, share: float, log: Log, alone: bool
) -> NDArray[np.int32]:
    """Build under a name of this process, then rename: `home` is whole as soon as it exists."""
    building = home.with_name(f"{home.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    if alone:
        for left in home.parent.glob(f"{home.name}.*.tmp"):  # by a build that was killed
            shutil.rmtree(left, ignore_errors=True)
    try:
        sizes = _decode(building, files, entries, share, log)
        if _read_sizes(home) is None:  # else another process was faster
            shutil.rmtree(home, ignore_errors=True)
            try:
                building.rename(home)
            except OSError:
                if _read_sizes(home) is None:  # else another process was faster by a moment
                    raise
        return sizes
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _decode(
    building: Path, files: Mapping[Path, str], entries: Entries, share: float, log: Log
) -> NDArray[np.int32]:
    """Decode files (path -> sha256) into a new folder, with one thread a processor; return the sizes."""
    started = time.perf_counter()
    with ThreadPoolExecutor(available_processors()) as pool:
        sizes = np.array([entries.size(size) for size in pool.map(_upright_size, files)], np.int32)
        sizes = sizes.reshape(-1, 2)
        offsets = _offsets(sizes)
        total, free = int(offsets[-1]), shutil.disk_usage(building.parent).free
        need = f"{len(files)} images need {total / 1e6:,.1f} MB"
        if total > share * free:
            limit = f"{share:.0%} of the {free / 1e6:,.1f} MB free"
            raise OSError(errno.ENOSPC, f"{need}, more than {limit} (--pixel-cache on takes 95%)")
        log(f"pixel cache in {building.parent}: decoding once, {need}")
        building.mkdir()
        with (building / "pixels.u8").open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, total))
            pixels = np.memmap(file, np.uint8, "r+")

            def write(i: int, path: Path, sha256: str) -> None:
                entry = _readable(path, lambda: entries.load(path, sha256))
                if entry.shape != (sizes[i, 1], sizes[i, 0], 3):
                    raise _UnreadableError(f"{path} changed while it was read")
                pixels[offsets[i] : offsets[i + 1]] = entry.reshape(-1)

            for _ in pool.map(write, range(len(files)), files, files.values()):
                pass
            pixels.flush()
        with (building / "sizes.npy").open("wb") as index:
            np.save(index, sizes)
            os.fsync(index.fileno())
    if (seconds := time.perf_counter() - started) >= 1:
        log(f"decoded in {seconds:.0f} s")
    return sizes


class _UnreadableError(Exception):
    """A file cannot be read any more."""


def _readable(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except ChangedError:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged bytes
        raise _UnreadableError(f"{path} was readable before training and is not now: {error}") from error


def _upright_size(path: Path) -> Size:
    """Return width and height, without decoding.

    Raises:
        _UnreadableError: the file cannot be read any more.
    """

    def read() -> Size:
        try:
            opened: Image.Image = Image.open(path, formats=FORMATS)
        except Exception:  # a member of a tar file, or metadata that Pillow cannot read
            opened = open_image(read_image_file(path))
        with opened as image:
            size: Size = image.size
            return size[::-1] if on_its_side(image) else size

    return _readable(path, read)

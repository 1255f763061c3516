"""Decode once: a file of uint8 pixels that every rank maps into memory, so that loading is a slice.

An entry is an image by the sha256 of its file, whatever its name and split: folds, seeds and runs on the
same images share one cache. Only what is larger than the cache's size is made smaller; other images are
stored as they decode, and are the same pixels with and without the cache.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contract.errors import UserError
from serve.contract.images import FORMATS, open_image, read_image_file
from serve.contract.locks import file_lock
from serve.contract.orientation import on_its_side
from train.config import TrainConfig
from train.data.index import ImageSet
from train.data.reading import DECODER, ChangedError, read_image
from train.data.shrink import FILTER, LEAST_RATIO, Shrunk, Size

Pixels = NDArray[np.uint8]  # [H, W, 3]

FORMAT = 2  # of the entries, and of what files decode to
MOST_OF_FREE_SPACE = {"auto": 0.25, "on": 0.95}
LARGEST_ENLARGED = 2.0  # times the input: what the smallest random crops are cut from


@dataclass(frozen=True)
class Stored:
    """How an image becomes an entry."""

    settings: Mapping[str, Any]
    """All that decides the pixels, plain values."""
    size: Callable[[Size], Size]
    """Of an entry, from the image's upright size."""
    pixels: Callable[[Image.Image], Pixels]
    decode: Callable[[Image.Image], Image.Image] | None = None
    """As in `load_image`."""

    def load(self, path: Path, sha256: str = "") -> Pixels:
        """Raises OSError or UserError when the file cannot be read, or its bytes have another hash."""
        return self.pixels(read_image(path, self.decode, sha256))


@dataclass(frozen=True)
class PixelCache:
    file: Path
    offsets: NDArray[np.int64]
    """[N] of an image's first byte."""
    sizes: NDArray[np.int32]
    """[N, 2] width, height."""

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Pixels:
        """Read-only, uint8 [H, W, 3]; not a copy."""
        offset, (width, height) = int(self.offsets[index]), self.sizes[index].tolist()
        return self._bytes[offset : offset + 3 * width * height].reshape(height, width, 3)

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        return np.memmap(self.file, np.uint8, "r").view(np.ndarray)

    def __getstate__(self) -> dict[str, Any]:  # a loader process maps the file anew
        return {name: value for name, value in self.__dict__.items() if name != "_bytes"}


def training_entries(config: TrainConfig) -> Stored:
    """Images whose shorter side is at most `cache_size`, or else so large that the smallest random crop is
    not enlarged (to at most twice the input).

    They are made smaller by Lanczos' filter, whatever the preprocessing's: each crop is resized once more,
    and two passes of a softer one would train on blurred images and validate on sharp ones.
    """
    preprocess = config.preprocess()
    needed = max(preprocess.resize_size, preprocess.size)
    if config.crop_scale < 1:
        enlarged = min(LARGEST_ENLARGED, 1 / math.sqrt(config.crop_scale))
        needed = max(needed, math.ceil(config.input_size(config.image_size) * enlarged))
    entry = Shrunk(config.cache_size or needed)
    settings = {"short_side": entry.short_side, "interpolation": FILTER, "least_ratio": LEAST_RATIO}
    return Stored(settings, entry.size, entry, entry.decode)


def validation_entries(config: TrainConfig) -> Stored:
    """The very pixels that are validated."""
    preprocess = config.preprocess()
    side = (preprocess.size, preprocess.size)
    return Stored({"preprocess": preprocess.to_dict()}, lambda _: side, preprocess)


def open_cache(
    folder: Path, images: ImageSet, stored: Stored, mode: str, say: Callable[[str], None]
) -> PixelCache | None:
    """The cache of these images, built first if need be; None when `mode` is off, or auto and the disk is
    too full or not ours to write, or an image cannot be read any more. Processes that want the same one at
    the same time build it once.

    Raises:
        UserError: mode is on and there is no room for it, or nothing can be written; or an image has
            changed since it was scanned.
    """
    if mode == "off":
        return None
    sha256s, first = np.unique(np.array(images.sha256), return_index=True)
    home = folder / f"pixels-{_key(sha256s, stored)}"
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            risk = "trainings that start at the same time decode all images each"
            lock = stack.enter_context(file_lock(home.with_suffix(".lock"), risk, say))
        except OSError as error:
            refused = f"no pixel cache can be kept in {folder}: {error.strerror}"
            if mode == "on":
                raise UserError(f"{refused}; choose another --output, or use --pixel-cache off") from error
            say(f"warning: {refused}; images are decoded in every epoch")
            return None
        index = _read_index(home)
        if index is None:
            paths = [images.root / images.paths[i] for i in first]
            try:
                index = _build(home, paths, sha256s.tolist(), stored, mode, say, lock is not None)
            except ChangedError as error:
                raise UserError(
                    f"{error}: start again; if that ends in the same way, the file system keeps no time of "
                    f"change: delete {folder}/scan-*.json"
                ) from error
            except RuntimeError as error:
                say(f"warning: no pixel cache, images are decoded in every epoch: {error}")
                return None
            if index is None:
                return None
    slots = np.searchsorted(sha256s, np.array(images.sha256))
    offsets, sizes = index
    return PixelCache(home / "pixels.u8", offsets[slots], sizes[slots])


def _key(sha256s: NDArray[np.str_], stored: Stored) -> str:
    settings = json.dumps({"format": FORMAT, "decoder": DECODER, **stored.settings}, sort_keys=True)
    return hashlib.sha256("\n".join([settings, *sha256s]).encode()).hexdigest()[:16]


def _read_index(home: Path) -> tuple[NDArray[np.int64], NDArray[np.int32]] | None:
    """None: not there, or not whole."""
    try:
        sizes = np.load(home / "sizes.npy", allow_pickle=False)
        offsets = _offsets(sizes)
        return (offsets[:-1], sizes) if (home / "pixels.u8").stat().st_size == max(1, offsets[-1]) else None
    except (OSError, ValueError):
        return None


def _offsets(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """[N + 1]"""
    bytes_of = 3 * sizes.astype(np.int64).prod(axis=1)
    return np.concatenate([np.zeros(1, np.int64), bytes_of.cumsum()])


def _build(
    home: Path,
    paths: Sequence[Path],
    sha256s: Sequence[str],
    stored: Stored,
    mode: str,
    say: Callable[[str], None],
    alone: bool = True,
) -> tuple[NDArray[np.int64], NDArray[np.int32]] | None:
    """Build under another name, which no other process has: `home` is whole as soon as it is there."""
    building = home.with_name(f"{home.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        if alone:
            for left in home.parent.glob(f"{home.name}.*.tmp"):  # by a build that was killed
                shutil.rmtree(left, ignore_errors=True)
        built = _decode(building, home, paths, sha256s, stored, mode, say)
        if built is not None and _read_index(home) is None:  # else another process was faster
            shutil.rmtree(home, ignore_errors=True)
            try:
                building.rename(home)
            except OSError:
                if _read_index(home) is None:  # else another process was faster by a moment
                    raise
        return built
    finally:
        if building.exists():
            shutil.rmtree(building, ignore_errors=True)


def _decode(
    building: Path,
    home: Path,
    paths: Sequence[Path],
    sha256s: Sequence[str],
    stored: Stored,
    mode: str,
    say: Callable[[str], None],
) -> tuple[NDArray[np.int64], NDArray[np.int32]] | None:
    started = time.perf_counter()
    with ThreadPoolExecutor(joblib.cpu_count()) as pool:
        sizes = np.array([stored.size(size) for size in pool.map(_upright_size, paths)], np.int32)
        offsets = _offsets(sizes.reshape(-1, 2))
        total, free = int(offsets[-1]), shutil.disk_usage(home.parent).free
        what = f"the pixel cache of {len(paths)} images needs {total / 1e6:,.1f} MB in {home.parent}"
        if total > MOST_OF_FREE_SPACE[mode] * free:
            room = f"{what}, which has {free / 1e6:,.1f} MB free"
            if mode == "on":
                raise UserError(f"{room}: free some, lower --cache_size, or use --pixel_cache off")
            say(f"{room}: images are decoded in every epoch; --pixel_cache on takes more than a quarter")
            return None
        say(f"{what}: decoding once")
        building.mkdir()
        with (building / "pixels.u8").open("w+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, total))
            except OSError as error:
                if mode == "on":
                    raise UserError(f"{what}: {error.strerror}") from error
                say(f"{what}: {error.strerror}; images are decoded in every epoch")
                return None
            pixels = np.memmap(file, np.uint8, "r+")

            def write(i: int) -> None:
                entry = _load(stored, paths[i], sha256s[i])
                if entry.shape != (sizes[i, 1], sizes[i, 0], 3):
                    raise RuntimeError(f"{paths[i]} changed while it was read")
                pixels[offsets[i] : offsets[i + 1]] = entry.reshape(-1)

            for _ in pool.map(write, range(len(paths))):
                pass
            pixels.flush()
        with (building / "sizes.npy").open("wb") as index:
            np.save(index, sizes)
            os.fsync(index.fileno())
    say(f"decoded in {time.perf_counter() - started:.0f} s")
    return offsets[:-1], sizes


def _upright_size(path: Path) -> Size:
    """Without decoding."""
    try:
        with _open(path) as image:
            width, height = image.size
            lying = on_its_side(image)
    except Exception as error:  # Pillow raises nearly anything on damaged bytes
        raise RuntimeError(f"{path} was readable before training and is not now: {error}") from error
    return (height, width) if lying else (width, height)


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=FORMATS)
    except Exception:  # a member of a tar file, or metadata that Pillow cannot read
        return open_image(read_image_file(path))


def _load(stored: Stored, path: Path, sha256: str) -> Pixels:
    try:
        return stored.load(path, sha256)
    except ChangedError:
        raise
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{path} was readable before training and is not now: {error}") from error

"""Scan of every image before training: hash, thumbnail, and what is unreadable or looks wrong."""

import base64
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contract.archive import file_status
from serve.contract.doubts import Doubts
from serve.contract.files import atomic_write
from serve.contract.images import MAX_MEGAPIXELS, load_image, read_image_file
from serve.processors import available_processors
from train.data.reading import DECODER, Shrink

THUMBNAIL = (8, 8)  # pixels
ENOUGH = Shrink(64)  # for a thumbnail: JPEGs need not be decoded whole
SECONDS_BETWEEN_SAVES = 300.0
TICK_NS = 10_000_000  # of the clock that times of change are read from


class ScanEntry(NamedTuple):
    """Result of reading a file, in the order of the cache; texts are empty where there is nothing."""

    stamp: str
    sha256: str = ""
    error: str = ""
    thumbnail: str = ""  # base64
    doubt: str = ""


@dataclass(frozen=True)
class ScanResult:
    sha256: dict[str, str]
    """Readable file -> hash of its bytes."""
    bad: dict[str, str]
    """Unreadable file -> reason."""
    thumbnails: NDArray[np.uint8]
    """[N, 8, 8], grey, in the order of `sha256`; a picture of any shape is squashed."""
    doubts: Doubts
    """Readable files whose picture looks wrong."""


def scan(
    root: Path, paths: Sequence[str], cache_folder: Path, max_megapixels: float = MAX_MEGAPIXELS
) -> ScanResult:
    """Decode, hash and shrink all files with one thread for each processor.

    Results are saved in `cache_folder` every few minutes, and used again while the file's size and times of
    modification and change, and the decoder, stay the same. cp -p, rsync -t and tar restore the time of
    modification; nobody can set that of change, where the file system keeps it (not FAT, squashfs and some
    mounted buckets). A file that could not be read at all is tried again: a mount may be back.
    """
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    cache_file = cache_folder / f"scan-{digest[:16]}.json"
    known = _load_cache(cache_file)
    limit = "" if max_megapixels == MAX_MEGAPIXELS else f":{max_megapixels:g}"

    def examine(path: str) -> tuple[str, ScanEntry]:
        info, cached, stamp = file_status(root / path), known.get(path), ""
        if info:  # a member of a tar file changes with the whole
            stamp = f"{info.st_size}:{info.st_mtime_ns}:{info.st_ctime_ns}:{DECODER}{limit}"
            if cached and cached.stamp == stamp:
                return path, cached
            if abs(time.time_ns() - info.st_ctime_ns) < TICK_NS:  # the next change may have the same time
                time.sleep(TICK_NS / 1e9)
        try:
            return path, _examine(root / path, stamp, max_megapixels)
        except OSError as error:
            return path, ScanEntry("", error=error.strerror or str(error))

    entries: dict[str, ScanEntry] = {}
    saved = time.monotonic()
    with ThreadPoolExecutor(available_processors()) as pool:
        for path, entry in pool.map(examine, paths):
            entries[path] = entry
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                _save_cache(cache_file, {**known, **entries})
                saved = time.monotonic()
    if any(known.get(path) != entry for path, entry in entries.items()):
        _save_cache(cache_file, {**known, **entries})
    good = {path: entry for path, entry in entries.items() if not entry.error}
    doubts = Doubts()
    for path, entry in good.items():
        if entry.doubt:
            doubts.add(path, entry.doubt)
    pixels = b"".join(base64.b64decode(entry.thumbnail) for entry in good.values())
    return ScanResult(
        sha256={path: entry.sha256 for path, entry in good.items()},
        bad={path: entry.error for path, entry in entries.items() if entry.error},
        thumbnails=np.frombuffer(pixels, np.uint8).reshape(-1, *THUMBNAIL),
        doubts=doubts,
    )


def _examine(path: Path, stamp: str, max_megapixels: float) -> ScanEntry:
    doubts: list[str] = []
    try:
        data = read_image_file(path)
        image = load_image(data, ENOUGH.decode, doubts, max_megapixels)
    except ValueError as error:
        return ScanEntry(stamp, error=str(error))
    # reducing_gap averages over whole multiples first: 17 ms for 32 for 12 megapixels, within 5 levels
    small = image.resize(THUMBNAIL, Image.Resampling.BILINEAR, reducing_gap=12.0).convert("L")
    thumbnail = base64.b64encode(small.tobytes()).decode()
    return ScanEntry(stamp, hashlib.sha256(data).hexdigest(), "", thumbnail, "".join(doubts))


def _load_cache(path: Path) -> dict[str, ScanEntry]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # no cache, or a damaged one: everything is read again
    entries = values.items() if isinstance(values, dict) else ()
    size = len(ScanEntry._fields)
    whole = [pair for pair in entries if isinstance(pair[1], list) and len(pair[1]) == size]
    return {path: ScanEntry(*fields) for path, fields in whole}


def _save_cache(path: Path, values: dict[str, ScanEntry]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "w") as file:
            file.write(json.dumps(values))
    except OSError as error:
        print(f"warning: the scan cannot be cached in {path}: {error}", flush=True)

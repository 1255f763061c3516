"""Images derived from other images of the same data set: masks, thumbnails.

Names only suggest them; pixels decide. A class of photographs called "mask" stays a class.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from serve.contract.image_files import DERIVED, DERIVED_KINDS, words
from serve.contract.images import load_image, read_image_file

ENDING = re.compile(
    rf"(?<=.)(?:[\s._-]+(?:{DERIVED_KINDS})s?(?:[\s._-]*\d+)?)+$", re.IGNORECASE | re.DOTALL
)
SAMPLES = 6  # pairs compared for each pattern
FEW_COLOURS = 8
ALMOST_ALL = 0.95  # of the pixels
SIDE = 128  # pixels; larger images are sampled
ALIKE_LEVELS, ALIKE_CORRELATION = 12.0, 0.9


def find_derived(root: Path, paths: Sequence[str]) -> dict[str, list[str]]:
    """Return pattern -> images of it that are derived from images of the same names in `paths`.

    A pattern is a folder (annotations/trimaps), or the files of a folder with one ending (cat/*_mask). A
    sample of each pattern is read: every image must have few colours where its original has many, or be
    the same picture, smaller.
    """
    patterns = defaultdict(list)
    for path in paths:
        patterns[_pattern(path)].append(path)
    others = patterns.pop("", [])
    originals = defaultdict(list)
    for path in others if patterns else ():
        originals[_stem(path)].append(path)
    derived = {}
    for pattern, images in patterns.items():
        pairs = [
            (path, _nearest(path, originals[stem])) for path in images if (stem := _stem(path)) in originals
        ]
        step = max(1, len(pairs) // SAMPLES)
        if 2 * len(pairs) >= len(images) and all(_is_derived(root, *p) for p in pairs[::step]):
            derived[pattern] = images
    return derived


def _pattern(path: str) -> str:
    """Return the pattern of an image whose folder or name suggests that it is derived, else ""."""
    folder, _, name = path.rpartition("/")
    if has_derived_word(folder):
        return folder
    ending = ENDING.search(os.path.splitext(name)[0])
    return f"{folder}/*{ending[0].rstrip('0123456789. _-')}" if ending else ""


@cache
def has_derived_word(folder: str) -> bool:
    """Return whether a word of the folder's name or path stands for derived images: train_masks."""
    return any(DERIVED.fullmatch(word) for word in words(folder))


def _stem(path: str) -> str:
    return ENDING.sub("", os.path.splitext(path.rpartition("/")[2])[0])


def _nearest(path: str, others: Iterable[str]) -> str:
    parts = set(path.split("/")[:-1])
    return max(others, key=lambda other: len(parts.intersection(other.split("/"))))


def _is_derived(root: Path, path: str, original: str) -> bool:
    try:
        one, other = (load_image(read_image_file(root / name)) for name in (path, original))
    except (ValueError, OSError):
        return False
    if _has_few_colours(one) and not _has_few_colours(other):
        return True
    if one.width >= other.width or one.height >= other.height:
        return False  # a camera that stands still takes pictures that look alike, but of one size
    a, b = (
        np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), float) for image in (one, other)
    )
    same_levels = min(a.std(), b.std()) >= 1 and np.abs(a - b).mean() <= ALIKE_LEVELS
    return bool(same_levels and np.corrcoef(a.ravel(), b.ravel())[0, 1] >= ALIKE_CORRELATION)


def _has_few_colours(image: Image.Image) -> bool:
    size = (min(SIDE, image.width), min(SIDE, image.height))
    levels = np.asarray(image.resize(size, Image.Resampling.NEAREST)).astype(np.int64) >> 3
    counts = np.bincount((levels @ [1024, 32, 1]).ravel())
    return bool(np.sort(counts)[-FEW_COLOURS:].sum() >= ALMOST_ALL * counts.sum())

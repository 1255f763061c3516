"""Images made from other images of the same data set: masks, thumbnails.

Their names only suggest it; their pixels decide. A class of photographs called "mask" stays a class.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contract.images import load_image, read_image_file

KINDS = (
    "mask|annot(?:ation)?|label|trimap|segm?|segmentation|gt|ground_?truth|matte|overlay|bbox"
    "|thumb(?:nail)?|preview|heatmap|depth|visuali[sz]ation"
)
MADE = re.compile(f"(?:(?:{KINDS})(?:e?s)?|labelids|truth|annotated|segmented|segmentation(class|object))")
ENDING = re.compile(rf"(?<=.)(?:[\s._-]+(?:{KINDS})s?(?:[\s._-]*\d+)?)+$", re.IGNORECASE | re.DOTALL)
SAMPLES = 6  # pairs looked at in each place
FEW_COLOURS = 8
ALMOST_ALL = 0.95  # of the pixels
SIDE = 128  # pixels looked at are at most so many in a row
ALIKE_LEVELS, ALIKE_CORRELATION = 12.0, 0.9


def words(name: str) -> list[str]:
    """The words of a folder's name, in lower case: trainImages_2017 -> train, images"""
    return [word.lower() for word in re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))]


def find_made(root: Path, paths: Sequence[str]) -> dict[str, list[str]]:
    """place -> images there that were made from other images of `paths`, which have the same names.

    A place is a folder (annotations/trimaps), or the files of a folder with one ending (cat/*_mask). All
    that are looked at must be made from their namesakes: of few colours where these are of many, or the
    same picture, smaller.
    """
    places = defaultdict(list)
    for path in paths:
        if place := _place(path):
            places[place].append(path)
    if not places:
        return {}
    suspects = {path for images in places.values() for path in images}
    wanted = {_stem(path) for path in suspects}
    originals = defaultdict(list)
    for path in paths:
        if path not in suspects and (stem := _stem(path)) in wanted:
            originals[stem].append(path)
    made = {}
    for place, images in places.items():
        pairs = [
            (path, _nearest(path, originals[stem])) for path in images if (stem := _stem(path)) in originals
        ]
        step = max(1, len(pairs) // SAMPLES)
        if 2 * len(pairs) >= len(images) and all(_is_made_from(root, *p) for p in pairs[::step]):
            made[place] = images
    return made


def _place(path: str) -> str:
    folder, _, name = path.rpartition("/")
    if place := _folder_place(folder):
        return place
    ending = ENDING.search(os.path.splitext(name)[0])
    return f"{folder}/*{ending[0].rstrip('0123456789. _-')}" if ending else ""


@cache
def _folder_place(folder: str) -> str:
    """The folder itself if its name, or one on the way, suggests images made from others; else ""."""
    return folder if any(MADE.fullmatch(word) for word in words(folder)) else ""


def _stem(path: str) -> str:
    return ENDING.sub("", os.path.splitext(path.rpartition("/")[2])[0])


def _nearest(path: str, others: Iterable[str]) -> str:
    parts = set(path.split("/")[:-1])
    return max(others, key=lambda other: len(parts.intersection(other.split("/"))))


def _is_made_from(root: Path, path: str, original: str) -> bool:
    try:
        one, other = (load_image(read_image_file(root / name)) for name in (path, original))
    except (ValueError, OSError):
        return False
    if _has_few_colours(one) and not _has_few_colours(other):
        return True
    # A camera that stands still takes pictures that look alike, but of one size.
    return one.width < other.width and one.height < other.height and _look_alike(one, other)


def _has_few_colours(image: Image.Image) -> bool:
    size = (min(SIDE, image.width), min(SIDE, image.height))
    levels = np.asarray(image.resize(size, Image.Resampling.NEAREST)).astype(np.int64) >> 3
    counts = np.bincount((levels @ [1024, 32, 1]).ravel())
    return bool(np.sort(counts)[-FEW_COLOURS:].sum() >= ALMOST_ALL * counts.sum())


def _look_alike(one: Image.Image, other: Image.Image) -> bool:
    a, b = _small(one), _small(other)
    if min(a.std(), b.std()) < 1:  # of one shade: nothing to compare
        return False
    return bool(np.abs(a - b).mean() <= ALIKE_LEVELS and np.corrcoef(a, b)[0, 1] >= ALIKE_CORRELATION)


def _small(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), np.float64).ravel()

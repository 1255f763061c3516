"""Near duplicates: files that show the same picture, re-encoded, resized or a little brighter.

Pictures with similar thumbnails (perceptual_hash.py) are read again and compared part by part at 32x32
pixels in colour. One part that differs makes two pictures: digits, forms and boards look alike at a glance.
A picture without detail (plain, a gradient, fewer than about 16 pixels wide) has no near duplicates.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from serve.contract.images import load_accepted
from serve.processors import available_processors
from train.data.perceptual_hash import similar_thumbnails

DETAIL_SIZE, PART_SIZE = 32, 4  # pixels: 64 parts of 4x4
MIN_SIMILARITY = 0.7  # of the part that differs most
NOISE_VARIANCE = 300.0  # squared grey levels by which a part may differ without any structure in it
MIN_DETAIL, MIN_DETAIL_CORRELATION = 2.0, 0.8  # grey levels within parts
MAX_GAIN, MAX_SHIFT = 1.33, 40.0  # contrast ratio and difference of mean grey levels of two copies
MAX_CONTRADICTIONS = 0.25  # share of groups with several labels
CHUNK = 512  # pairs compared at once


@dataclass(frozen=True)
class NearDuplicate:
    """Group of an image that has near duplicates, and its similarity to the image in the group's centre."""

    group: str  # smallest sha256 in it
    similarity: float  # of the part that differs most, 0.7 to 1


def near_duplicates(
    files: Sequence[Path], sha256: Sequence[str], thumbnails: NDArray[np.uint8]
) -> dict[str, NearDuplicate]:
    """Return sha256 -> group for each file that shows the same picture as another one.

    Every member of a group resembles its centre: a chain of pictures that change little by little is cut
    into several groups. The groups depend on contents only, not on names or order.

    Args:
        files: N images to read again where their thumbnails are alike.
        thumbnails: grey, uint8 [N, 8, 8].
    """
    hashes, first = np.unique(np.array(sha256, "S64"), return_index=True)
    pairs = similar_thumbnails(thumbnails[first])
    involved, indices = np.unique(pairs, return_inverse=True)
    details = _load_details([files[first[i]] for i in involved])
    near: dict[str, NearDuplicate] = {}
    for members, values in _stars(indices.reshape(-1, 2), details):
        names = [hashes[involved[member]].decode() for member in members]
        near |= {name: NearDuplicate(min(names), float(v)) for name, v in zip(names, values, strict=True)}
    return near


def _load_details(files: Sequence[Path]) -> NDArray[np.uint8]:
    """Read files as [N, 32, 32, 3]."""
    size = (DETAIL_SIZE, DETAIL_SIZE)

    def load(path: Path) -> NDArray[np.uint8]:
        try:
            image = load_accepted(path)
        except (OSError, ValueError):  # gone since the scan: training reports it
            return np.zeros((*size, 3), np.uint8)
        return np.asarray(image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0))

    with ThreadPoolExecutor(available_processors()) as pool:
        return np.array(list(pool.map(load, files)), np.uint8).reshape(-1, *size, 3)


def compare(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the similarity of pictures, uint8 [P, 32, 32, 3] (or [1, ...]) each, float32 [P]; 0: others.

    The darker one is brightened to the other. Then each part's similarity is 1 - MSE / (var_a + var_b + c),
    SSIM's structure term (Wang et al. 2004) with the difference of the means counted in.
    """
    x, y = (z.astype(np.float32) for z in np.broadcast_arrays(a, b))
    swap = x.mean(axis=(1, 2, 3)) > y.mean(axis=(1, 2, 3))
    x[swap], y[swap] = y[swap], x[swap]
    x, plausible = _brighten(x, y)
    parts_x, parts_y = _parts(x), _parts(y)
    error = ((parts_x - parts_y) ** 2).mean(axis=(2, 3))
    variance = (parts_x.var(axis=2) + parts_y.var(axis=2)).mean(axis=2)
    lowest = (1 - error / (variance + NOISE_VARIANCE)).min(axis=1)
    details = [parts.mean(axis=3) for parts in (parts_x, parts_y)]  # grey, [P, parts, pixels]
    details = [d - d.mean(axis=2, keepdims=True) for d in details]
    rms = [np.sqrt((d**2).mean(axis=(1, 2))) for d in details]
    correlation = (details[0] * details[1]).mean(axis=(1, 2)) / np.maximum(rms[0] * rms[1], 1e-6)
    same = plausible & (np.minimum(*rms) >= MIN_DETAIL) & (correlation >= MIN_DETAIL_CORRELATION)
    return np.where(same, np.clip(lowest, 0, 1), 0).astype(np.float32)


def _brighten(
    x: NDArray[np.float32], y: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return x with the contrast and brightness of y, and [P] whether that changed little; white stays."""
    middle = ((x > 5) & (y < 250)).astype(np.float32)  # what is not clipped to black or white
    middle[middle.mean(axis=(1, 2, 3)) < 0.1] = 1
    weight = middle / middle.sum(axis=(1, 2, 3), keepdims=True)

    def moments(z: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        mean = (weight * z).sum(axis=(1, 2, 3), keepdims=True)
        return mean, np.sqrt((weight * (z - mean) ** 2).sum(axis=(1, 2, 3), keepdims=True))

    (mean_x, deviation_x), (mean_y, deviation_y) = moments(x), moments(y)
    gain = (deviation_y + 0.1) / (deviation_x + 0.1)
    plausible = (np.abs(np.log(gain)) <= np.log(MAX_GAIN)) & (np.abs(mean_y - mean_x) <= MAX_SHIFT)
    return np.clip(mean_y + gain * (x - mean_x), 0, 255), plausible.ravel()


def _parts(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """[P, 32, 32, 3] -> [P, parts, pixels of a part, 3]"""
    side = DETAIL_SIZE // PART_SIZE
    cut = x.reshape(len(x), side, PART_SIZE, side, PART_SIZE, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(len(x), side * side, PART_SIZE * PART_SIZE, 3)


def _stars(
    pairs: NDArray[np.int64], details: NDArray[np.uint8]
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Return groups of two or more: (members, similarity of each to the group's centre).

    In each connected component, the image with the most copies is the centre of a group of all that
    resemble it; the same is done with the rest.
    """
    values = [compare(details[part[:, 0]], details[part[:, 1]]) for part in _chunks(pairs)]
    pairs = pairs[np.concatenate([np.zeros(0), *values]) >= MIN_SIMILARITY]
    count = len(details)
    copies = np.bincount(pairs.ravel(), minlength=count)
    links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), (count, count))
    component = connected_components(links, directed=False)[1]
    order = np.lexsort((np.arange(count), -copies, component))
    order = order[copies[order] > 0]
    groups = []
    for left in np.split(order, np.flatnonzero(np.diff(component[order])) + 1):
        while len(left) > 1:
            centre = details[left[:1]]
            similarity = np.concatenate([compare(details[part], centre) for part in _chunks(left)])
            similarity[0] = 1
            alike = similarity >= MIN_SIMILARITY
            if alike.sum() > 1:
                groups.append((left[alike], similarity[alike]))
            left = left[~alike]
    return groups


def _chunks(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]


def labels_decide(groups: Sequence[str], labels: Sequence[int], near: dict[str, NearDuplicate]) -> bool:
    """Return whether the labels of near duplicates differ so often that the classes are what differs.

    A few contradictions are wrong labels. With many, classes differ in less than this comparison sees, so
    that look-alikes are no copies.
    """
    known: dict[str, set[int]] = {entry.group: set() for entry in near.values()}
    for group, label in zip(groups, labels, strict=True):
        if group in known:
            known[group].add(label)
    contradictions = sum(len(values) > 1 for values in known.values())
    return contradictions >= 5 and contradictions > MAX_CONTRADICTIONS * len(known)

"""Find the images whose thumbnails are alike, also among a million.

Each thumbnail has a 54-bit perceptual hash, the signs of its lower frequencies; pairs of hashes that differ
in few bits are found by sorting (Manku et al., "Detecting near-duplicates for web crawling", 2007).
"""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn

HASH_BLOCKS, BLOCK_BITS, UNTOUCHED = 9, 6, 3  # 6 flipped bits leave at least 3 of 9 blocks as they were
MAX_FLIPPED_BITS = HASH_BLOCKS - UNTOUCHED
WINDOW = 32  # comparisons of an image within one run of equal blocks: bounds look-alike data
MAX_NEIGHBOURS = 8  # of an image's candidates the closest ones are kept
MIN_CONTRAST = 2.0  # standard deviation of a thumbnail, in grey levels, below which it is plain
MAX_DISTANCE = 0.25  # between thumbnails of mean 0 and norm 1: sqrt(2 - 2 * correlation)
ROWS = 100_000  # worked on at once

# Of the 63 frequencies of an 8x8 picture without its mean, low ones first; the highest are mostly noise.
FREQUENCIES = sorted(((i, j) for i in range(8) for j in range(8) if i + j), key=lambda f: (f[0] + f[1], f))[
    : HASH_BLOCKS * BLOCK_BITS
]


def similar_thumbnails(thumbnails: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return pairs [P, 2], i < j, of grey uint8 [N, 8, 8] within MAX_DISTANCE, each image's closest."""
    distinct = np.flatnonzero(thumbnails.reshape(-1, 64).std(axis=1) >= MIN_CONTRAST)
    vectors = thumbnails[distinct].reshape(-1, 64).astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)  # neither brightness nor contrast counts
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = similar_hashes(perceptual_hash(vectors))
    distances = np.concatenate(
        [
            np.linalg.norm(vectors[part[:, 0]] - vectors[part[:, 1]], axis=1)
            for part in np.array_split(pairs, len(pairs) // ROWS + 1)
        ]
    )
    near = distances <= MAX_DISTANCE
    pairs, distances = pairs[near], distances[near]
    keep = np.zeros(len(pairs), bool)
    for column in (0, 1):
        order = np.lexsort((pairs[:, 1 - column], distances, pairs[:, column]))
        image = pairs[order, column]
        rank = np.arange(len(order)) - np.searchsorted(image, image)
        keep[order[rank < MAX_NEIGHBOURS]] = True
    return distinct[pairs[keep]]


def perceptual_hash(vectors: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Return the signs [N] of the frequencies of [N, 64]; each block of bits has low and high ones."""
    hashes = np.zeros(len(vectors), np.uint64)
    for start in range(0, len(vectors), ROWS):
        spectrum = dctn(vectors[start : start + ROWS].reshape(-1, 8, 8), axes=(1, 2), norm="ortho")
        for k, (i, j) in enumerate(FREQUENCIES):
            bit = BLOCK_BITS * (k % HASH_BLOCKS) + k // HASH_BLOCKS
            hashes[start : start + ROWS] |= (spectrum[:, i, j] > 0).astype(np.uint64) << np.uint64(bit)
    return hashes


def similar_hashes(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return pairs [P, 2], i < j, of hashes, uint64 [N], that differ in at most MAX_FLIPPED_BITS bits.

    Two such hashes agree in three whole blocks: for each choice of three, equal ones stand side by side
    once sorted. All pairs are found unless more than WINDOW images share three blocks.
    """
    by_hash = np.argsort(hashes, kind="stable")
    hashes = hashes[by_hash]  # then a run of equal blocks is in the order of the other blocks
    count = len(hashes)
    found = [np.zeros(0, np.int64)]
    for blocks in combinations(range(HASH_BLOCKS), UNTOUCHED):
        keys = hashes & np.uint64(sum((2**BLOCK_BITS - 1) << BLOCK_BITS * block for block in blocks))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for offset in range(1, WINDOW + 1):
            run = np.flatnonzero(keys[offset:] == keys[:-offset])
            if not len(run):
                break
            a, b = order[run], order[run + offset]
            close = np.bitwise_count(hashes[a] ^ hashes[b]) <= MAX_FLIPPED_BITS
            a, b = by_hash[a[close]], by_hash[b[close]]
            found.append(np.minimum(a, b) * count + np.maximum(a, b))
        if sum(map(len, found[1:])) > 4 * len(found[0]) + 10_000_000:
            found = [np.unique(np.concatenate(found))]
    codes = np.unique(np.concatenate(found))
    return np.stack([codes // max(count, 1), codes % max(count, 1)], axis=1)

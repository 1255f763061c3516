"""Images whose thumbnails are alike are found, all of them, in a time that a million images allow."""

import numpy as np
import pytest
from numpy.typing import NDArray

from train.data.perceptual_hash import MAX_FLIPPED_BITS, similar_hashes, similar_thumbnails


def flipped(hashes: NDArray[np.uint64], bits: int, rng: np.random.Generator) -> NDArray[np.uint64]:
    """Each hash with as many different bits turned."""
    places = rng.permuted(np.tile(np.arange(54, dtype=np.uint64), (len(hashes), 1)), axis=1)[:, :bits]
    result: NDArray[np.uint64] = hashes ^ (np.uint64(1) << places).sum(axis=1, dtype=np.uint64)
    return result


def pairs_of(hashes: NDArray[np.uint64]) -> set[tuple[int, int]]:
    return {(i, j) for i, j in similar_hashes(hashes).tolist()}


def test_all_pairs_that_differ_in_few_bits_are_found_and_no_others() -> None:
    rng = np.random.default_rng(0)
    some = rng.integers(0, 2**54, 20, dtype=np.uint64)
    hashes = np.concatenate([some, *(flipped(some, bits, rng) for bits in range(12))])
    distances = np.bitwise_count(hashes[:, None] ^ hashes)
    close = np.argwhere(np.triu(distances <= MAX_FLIPPED_BITS, 1))
    assert len(close) > 300
    assert pairs_of(hashes) == {(i, j) for i, j in close.tolist()}


def test_no_or_one_image_has_no_pair() -> None:
    assert similar_hashes(np.zeros(0, np.uint64)).shape == (0, 2)
    assert similar_thumbnails(np.zeros((0, 8, 8), np.uint8)).shape == (0, 2)
    assert similar_thumbnails(np.arange(64, dtype=np.uint8).reshape(1, 8, 8)).shape == (0, 2)


@pytest.mark.slow
def test_a_hundred_thousand_hashes_are_compared_without_a_square_of_pairs() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**54, 100_000, dtype=np.uint64)
    hashes[-1000:] = flipped(hashes[:1000], MAX_FLIPPED_BITS, rng)
    pairs = pairs_of(hashes)
    assert {(i, 99_000 + i) for i in range(1000)} <= pairs


def test_many_equal_hashes_make_no_square_of_pairs() -> None:
    assert len(similar_hashes(np.full(1000, 7, np.uint64))) < 40 * 1000


def test_brightness_and_contrast_do_not_hide_a_thumbnail_and_plain_ones_are_like_nothing() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(60, 180, (8, 8))
    other = rng.integers(60, 180, (8, 8))
    plain = np.full((8, 8), 90) + rng.integers(0, 2, (8, 8))
    thumbnails = np.array([one, other, plain, one * 0.8, one + 20, plain, other * 1.2], np.uint8)
    assert similar_thumbnails(thumbnails).tolist() == [[0, 3], [0, 4], [1, 6], [3, 4]]

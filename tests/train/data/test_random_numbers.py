"""Random numbers are functions of their key, and look random along every axis of it."""

import numpy as np
import pytest
from scipy import stats

from train.data.random_numbers import seed_of, uniforms


def test_neighbouring_keys_have_unrelated_seeds() -> None:
    seeds = {seed_of("test", a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert len({seed_of("test", 1), seed_of("test", 1, 0), seed_of("other", 1)}) == 3


def test_a_samples_numbers_are_the_same_in_any_batch() -> None:
    together = uniforms(7, range(1000), 5)
    assert together.shape == (1000, 5)
    np.testing.assert_array_equal(uniforms(7, [999, 3], 5), together[[999, 3]])
    np.testing.assert_array_equal(uniforms(7, [3], 3), together[3:4, :3])
    assert not np.isin(uniforms(8, range(1000), 5), together).any()


@pytest.mark.parametrize("stride", [1, 2, 64, 2**20])
def test_numbers_are_uniform_and_independent(stride: int) -> None:
    values = uniforms(seed_of("test", stride), np.arange(20_000) * stride, 4)
    assert values.min() >= 0
    assert values.max() < 1
    for column in values.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    rows = np.corrcoef(values.T) - np.eye(4)
    neighbours = [np.corrcoef(column[:-1], column[1:])[0, 1] for column in values.T]
    assert max(np.abs(rows).max(), np.abs(neighbours).max()) < 5 / np.sqrt(len(values))
    pairs = stats.chisquare(np.histogram2d(values[:-1, 0], values[1:, 0], bins=16)[0].ravel())
    assert pairs.pvalue > 1e-4


def test_numbers_of_neighbouring_seeds_are_independent() -> None:
    columns = np.stack([uniforms(seed, range(5000), 1)[:, 0] for seed in range(20)])
    off = np.corrcoef(columns) - np.eye(20)
    assert np.abs(off).max() < 5 / np.sqrt(5000)

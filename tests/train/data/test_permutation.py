"""The permutation that takes no memory: each index exactly once, and no pattern to be felt in training."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from train.data.permutation import Permutation

LARGE = 1_000_000_007


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_every_index_comes_exactly_once(size: int, seed: int) -> None:
    order = Permutation(size, seed)[np.arange(size)]
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("size", [2**10, 2**10 - 1, 2**10 + 1, 2**17 - 1, 2**17 + 1])
def test_powers_of_two_and_their_neighbours(size: int) -> None:
    assert np.array_equal(np.sort(Permutation(size, 1)[np.arange(size)]), np.arange(size))


@given(st.integers(1, 2**40), st.data())
@settings(max_examples=100, deadline=None)
def test_an_index_depends_on_its_place_alone(size: int, data: st.DataObject) -> None:
    """Not on which places are asked for with it: a rank or a resume sees what all see."""
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    permutation = Permutation(size, 5)
    together = permutation[places]
    assert (together >= 0).all()
    assert (together < size).all()
    assert together.tolist() == [int(permutation[places[i : i + 1]][0]) for i in range(len(places))]


@pytest.mark.slow
def test_seeds_give_unrelated_orders() -> None:
    places = np.arange(100_000)
    orders = [Permutation(LARGE, seed)[places] for seed in range(4)]
    for i, a in enumerate(orders):
        assert len(np.unique(a)) == len(a)
        for b in orders[i + 1 :]:
            assert (a == b).mean() < 1e-3
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.015  # 4.7 standard deviations


@pytest.mark.slow
@pytest.mark.parametrize("size", [2**20, LARGE, 2**30 + 1])
@pytest.mark.parametrize("first", [0, 700_000])
def test_a_stretch_of_the_epoch_is_a_fair_sample_of_the_data_set(size: int, first: int) -> None:
    """Data sets are sorted by class: a batch must not come from one part of them."""
    order = Permutation(size, 3)[np.arange(first, first + 300_000)]
    parts = np.bincount(order * 100 // size, minlength=100)
    assert chisquare(parts).pvalue > 1e-6
    last_digits = np.bincount(order % 64, minlength=64)
    assert chisquare(last_digits, np.full(64, len(order) / 64)).pvalue > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("lag", [1, 2, 32, 1024, 32768])
def test_neighbours_in_the_epoch_are_not_neighbours_in_the_data_set(lag: int) -> None:
    order = Permutation(LARGE, 4)[np.arange(400_000)] / LARGE
    assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 0.008  # 5 standard deviations
    differences = np.histogram(np.mod(order[lag:] - order[:-lag], 1), bins=50, range=(0, 1))[0]
    assert chisquare(differences).pvalue > 1e-6


@pytest.mark.slow
def test_small_sizes_reach_every_order_about_as_often() -> None:
    """24 orders of 4 from 4,800 seeds; a Feistel network of 4 values is the hardest case."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(4800):
        order = tuple(Permutation(4, seed)[np.arange(4)].tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert max(counts.values()) < 2 * 4800 / 24

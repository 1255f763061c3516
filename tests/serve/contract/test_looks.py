"""Sets of images are compared by size, shape and colour, of which counts add up."""

from collections import Counter

import numpy as np
import pytest

from serve.contract.looks import Look, Looks, distance, look_of, quantiles


def looks(*sizes: tuple[int, int], grey: bool = False) -> Looks:
    found = Looks()
    for width, height in sizes:
        found.add(Look(min(width, height), width / height, grey))
    return found


def test_the_look_of_an_image() -> None:
    grey = np.repeat(np.random.default_rng(0).integers(0, 250, (64, 64, 1), np.uint8), 3, axis=2)
    assert look_of((640, 480), grey) == Look(480, 640 / 480, True)
    grey[::8, ::8, 0] += 3  # as after a lossy format
    assert look_of((300, 600), grey).is_grey
    grey[24:40, 24:40, 2] += 4
    assert look_of((300, 600), grey) == Look(300, 0.5, False)
    assert not look_of((1, 1), np.array([[[0, 200, 0]]], np.uint8)).is_grey


def test_parts_add_up_and_survive_json() -> None:
    whole = looks((640, 480), (100, 100), (64, 64))
    part = looks((640, 480))
    part.join(looks((100, 100), (64, 64)))
    assert part == whole == Looks.from_dict(whole.to_dict())
    assert whole.to_dict()["short_side_quantiles"] == quantiles(whole.short_side)
    assert looks((64, 64), grey=True).grey_share == 1


@pytest.mark.parametrize("side", [1, 8, 224, 375, 8000])
def test_quantiles_are_right_to_the_width_of_a_bin(side: int) -> None:
    for value in quantiles(looks(*[(side, side)] * 10).short_side):
        assert value == pytest.approx(side, rel=0.1)
    assert quantiles(Counter()) == []


def test_the_distance_of_distributions() -> None:
    assert distance({1: 5, 2: 5}, {1: 50, 2: 50}) == 0
    assert distance({1: 5}, {9: 1}) == 1
    assert distance({1: 1, 2: 1}, {2: 1, 3: 1}) == 0.5
    assert distance({"a": 3, "b": 1}, {"a": 1, "b": 3}, ordered=False) == 0.5
    assert distance({}, {1: 1}) == 0

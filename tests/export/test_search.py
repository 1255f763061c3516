"""The search for layers to keep in float32: the worst ones, no more than needed, and in time."""

from collections.abc import Sequence

import pytest

from export.search import choose_float_layers

LAYERS = [f"layer{i}" for i in range(12)]
SHARES = dict.fromkeys(LAYERS, 0.001) | {"layer7": 0.5, "layer2": 0.2, "layer9": 0.1}


class Model:
    """Each layer adds its share to the error; a measurement takes a second."""

    def __init__(self, shares: dict[str, float]):
        self.shares, self.now, self.asked = shares, 0.0, 0

    def error(self, float_layers: Sequence[str]) -> float:
        self.now += 1
        self.asked += 1
        return sum(share for name, share in self.shares.items() if name not in float_layers)

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        (1.0, ()),
        (0.4, ("layer7",)),
        (0.15, ("layer7", "layer2")),
        (0.05, ("layer7", "layer2", "layer9")),
    ],
)
def test_the_worst_layers_stay_in_float32_until_the_target_is_met(
    target: float, chosen: tuple[str, ...]
) -> None:
    model = Model(SHARES)
    search = choose_float_layers(LAYERS, model.error, target, 1000, model.clock)
    assert search.float_layers[: len(chosen)] == chosen
    assert len(search.float_layers) <= max(1, 2 * len(chosen)) - (not chosen)
    assert search.error <= target
    assert search.error_of_all_int8 == pytest.approx(0.809)
    assert search.measured == (0 if not chosen else 12)


def test_where_all_is_well_nothing_is_searched() -> None:
    model = Model(SHARES)
    choose_float_layers(LAYERS, model.error, 1.0, 1000, model.clock)
    assert model.asked == 1


def test_a_target_out_of_reach_keeps_at_most_half_the_layers() -> None:
    model = Model(SHARES)
    search = choose_float_layers(LAYERS, model.error, 0.0, 1000, model.clock)
    assert len(search.float_layers) == 4  # 1, 2, 4; 8 would be more than half
    assert search.tried.keys() == {0, 1, 2, 4}


@pytest.mark.parametrize("seconds", [0.0, 3.0, 9.0])
def test_the_time_is_kept_and_the_best_so_far_is_taken(seconds: float) -> None:
    model = Model(SHARES)
    search = choose_float_layers(LAYERS, model.error, 0.0, seconds, model.clock)
    assert model.now <= seconds + 3  # one measurement in all cases, one running when the time is over
    assert search.measured < len(LAYERS)
    assert search.error <= search.error_of_all_int8


def test_layers_that_do_no_harm_alone_are_not_kept() -> None:
    """Keeping a layer in float32 can even add to the error."""
    model = Model(dict.fromkeys(LAYERS, -0.1) | {"base": 5.0})
    search = choose_float_layers(LAYERS, model.error, 0.1, 1000, model.clock)
    assert search.float_layers == ()
    assert search.error == search.error_of_all_int8

"""The learning rate at chosen steps."""

import math

import pytest
from train_data import build

from train.config import TrainConfig
from train.optim.optimizers import build_optimizer
from train.optim.schedule import build_scheduler, lr_factor


def test_the_schedule_is_on_top_of_the_layers_rates() -> None:
    config = TrainConfig(lr=0.2, epochs=2, warmup_epochs=1, layer_decay=0.5)
    optimizer = build_optimizer(config, build())
    scheduler = build_scheduler(config, optimizer, 2)
    first = [group["lr"] for group in optimizer.param_groups]
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2 * lr for lr in first])
    assert first[0] == pytest.approx(0.1), "the head's rate comes first, which is the one that is logged"


def test_the_warm_up_is_linear_and_the_cosine_ends_at_0() -> None:
    config = TrainConfig(epochs=11, warmup_epochs=1)
    factors = {step: lr_factor(step, config, 10) for step in (0, 4, 9, 10, 35, 60, 110, 500)}
    assert factors[0] == 0.1
    assert factors[4] == 0.5
    assert factors[9] == factors[10] == 1.0
    assert factors[35] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == factors[500] == 0.0


def test_of_a_short_run_half_is_warm_up_at_most() -> None:
    config = TrainConfig(epochs=1, warmup_epochs=1)
    factors = [lr_factor(step, config, 10) for step in range(10)]
    assert max(factors) == factors[4] == factors[5] == 1.0
    assert factors[9] < 0.1


def test_a_constant_schedule_stays_at_the_peak() -> None:
    config = TrainConfig(epochs=3, warmup_epochs=0.5, schedule="constant")
    assert [lr_factor(step, config, 4) for step in (0, 1, 2, 11, 99)] == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("warmup_epochs", [0.0, 3.0, 99.0])
def test_any_length_of_warm_up_gives_factors_from_0_to_1(warmup_epochs: float) -> None:
    config = TrainConfig(epochs=3, warmup_epochs=warmup_epochs)
    assert all(0 < lr_factor(step, config, 4) <= 1 for step in range(12))


def test_the_scheduler_sets_the_learning_rate_of_each_step() -> None:
    config = TrainConfig(lr=0.2, epochs=2, warmup_epochs=1)
    optimizer = build_optimizer(config, build())
    scheduler = build_scheduler(config, optimizer, 2)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1, 0.2, 0.2, 0.1])

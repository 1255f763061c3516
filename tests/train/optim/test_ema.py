"""The moving average of weights and statistics at chosen steps."""

import pytest
import torch
from torch import nn
from train_data import build

from train.optim.ema import MovingAverage


def averaged(decay: float, values: list[float]) -> float:
    """Average of a weight that has these values at successive steps."""
    net = nn.Linear(1, 1)
    ema = MovingAverage(net, decay)
    for value in values:
        nn.init.constant_(net.weight, value)
        ema.update_parameters(net)
    return float(ema.module.weight.item())


def test_the_averages_decay_grows_to_its_setting() -> None:
    assert averaged(0.9, [5.0]) == 5.0  # the first step's weights replace the initial ones
    first = 2 / 11
    assert averaged(0.9, [5.0, 1.0]) == pytest.approx(first * 5 + (1 - first) * 1)
    second = 3 / 12
    expected = second * (first * 5 + (1 - first) * 1) + (1 - second) * 2
    assert averaged(0.9, [5.0, 1.0, 2.0]) == pytest.approx(expected)
    assert averaged(0.1, [5.0, 1.0]) == pytest.approx(0.1 * 5 + 0.9 * 1)


def test_bounds_that_are_infinite_stay_what_they_are() -> None:
    net = nn.Linear(1, 1)
    net.register_buffer("bound", torch.tensor([-torch.inf, torch.inf]))
    ema = MovingAverage(net, 0.9)
    for _ in range(3):
        ema.update_parameters(net)
    assert ema.module.bound.tolist() == [-torch.inf, torch.inf]


def test_the_average_includes_batch_norm_statistics() -> None:
    net = build().train()
    ema = MovingAverage(net, 0.9)
    for _ in range(2):
        net(torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8))
        ema.update_parameters(net)
    ours, averages = dict(net.named_buffers()), dict(ema.module.named_buffers())
    assert averages["network.features.1.num_batches_tracked"] == 2
    name = "network.features.1.running_var"
    assert not torch.equal(averages[name], ours[name])
    assert not torch.equal(averages[name], torch.ones_like(averages[name]))

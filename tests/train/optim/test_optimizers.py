"""Learning rate, weight decay and the moving average at chosen steps."""

import math
from typing import Any

import pytest
import torch
from timm.optim import muon
from torch import nn

from train.config import TrainConfig
from train.distributed import Ranks
from train.engine.state import build_trainee
from train.models.classifier import ImageClassifier, build_model
from train.models.layers import layer_groups
from train.optim.optimizers import build_ema, build_optimizer, build_scheduler, lr_factor
from train.precision import Precision


def model() -> ImageClassifier:
    torch.manual_seed(0)
    return build_model("simple_cnn", 2, 16)[0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_biases_and_normalisation_layers_do_not_decay(optimizer: str) -> None:
    net = model()
    decayed, others = build_optimizer(TrainConfig(optimizer=optimizer, weight_decay=0.3), net).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in net.named_parameters()}
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    assert {names[id(p)] for p in others["params"]} == {
        name
        for name, module in net.named_parameters()
        if name.endswith("bias") or ".features.1." in f".{name}" or module.ndim == 1
    }
    assert len(decayed["params"]) == 6
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_frozen_parameters_are_left_out() -> None:
    net = model()
    net.freeze(-1)
    groups = build_optimizer(TrainConfig(), net).param_groups
    head = net.network.classifier[3]
    assert [list(group["params"]) for group in groups] == [[head.weight], [head.bias]]


def rates(net: ImageClassifier, **changes: Any) -> dict[str, float]:
    names = {p: name for name, p in net.network.named_parameters()}
    optimizer = build_optimizer(TrainConfig(**changes), net)
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_layers_learn_slower_the_further_they_are_from_the_head(optimizer: str) -> None:
    net = model()
    found = rates(net, lr=0.2, layer_decay=0.5, optimizer=optimizer)
    for depth, group in enumerate(reversed(layer_groups(net.network))):
        assert [found[name] for name in group] == pytest.approx([0.2 * 0.5**depth] * len(group))
    assert len(found) == len(list(net.parameters()))
    assert set(rates(net, lr=0.2).values()) == {0.2}


def test_layer_decay_leaves_weight_decay_and_freezing_as_they_are() -> None:
    net = model()
    net.freeze(2)
    frozen = {name for group in layer_groups(net.network)[:2] for name in group}
    assert set(rates(net, layer_decay=0.5)) == {n for n, _ in net.network.named_parameters()} - frozen
    groups = build_optimizer(TrainConfig(layer_decay=0.5, weight_decay=0.3), net).param_groups
    for group in groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.3}


def test_the_schedule_is_on_top_of_the_layers_rates() -> None:
    config = TrainConfig(lr=0.2, epochs=2, warmup_epochs=1, layer_decay=0.5)
    optimizer = build_optimizer(config, model())
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
    optimizer = build_optimizer(config, model())
    scheduler = build_scheduler(config, optimizer, 2)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1, 0.2, 0.2, 0.1])


def averaged(decay: float, values: list[float]) -> float:
    """Average of a weight that has these values at successive steps."""
    net = nn.Linear(1, 1)
    ema = build_ema(TrainConfig(ema=decay), net)
    assert ema is not None
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


def test_the_average_includes_batch_norm_statistics() -> None:
    net = model().train()
    ema = build_ema(TrainConfig(ema=0.9), net)
    assert ema is not None
    for _ in range(2):
        net(torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8))
        ema.update_parameters(net)
    ours, averages = dict(net.named_buffers()), dict(ema.module.named_buffers())
    assert averages["network.features.1.num_batches_tracked"] == 2
    name = "network.features.1.running_var"
    assert not torch.equal(averages[name], ours[name])
    assert not torch.equal(averages[name], torch.ones_like(averages[name]))


def test_the_average_can_be_off() -> None:
    assert build_ema(TrainConfig(ema=0.0), model()) is None


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_a_first_step_that_is_skipped_leaves_nothing_behind(name: str) -> None:
    """torch's fused SGD would start from uninitialised memory."""
    config = TrainConfig(optimizer=name, lr=0.01, schedule="constant", warmup_epochs=0)
    weights = []
    for skip_first in (False, True):
        torch.manual_seed(0)
        net = model()
        trainee = build_trainee(config, net, 10, Precision(), Ranks(), torch.device("cpu"))
        junk = [torch.full_like(p, 1e30) for p in net.parameters()]
        del junk  # what uninitialised memory is likely to be now
        for finite in ([False] if skip_first else []) + [True]:
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 if finite else torch.nan)
            trainee.begin_step()
            assert bool(trainee.update(0.0)) == finite
        weights.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("autocast", ["", "bfloat16"])
def test_muon_orthogonalises_in_the_precision_of_training(
    autocast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever processor a rank has: all must change the weights alike."""
    usual, seen = muon.zeropower_via_newtonschulz, set()

    def watched(*arguments: Any, dtype: torch.dtype = torch.bfloat16, **rest: Any) -> torch.Tensor:
        seen.add(dtype)
        return usual(*arguments, dtype=dtype, **rest)

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", watched)
    net = model()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    build_optimizer(TrainConfig(optimizer="muon"), net, Precision(autocast)).step()
    assert seen == {torch.bfloat16 if autocast else torch.float32}
    assert muon.zeropower_via_newtonschulz is watched


def test_muon_steps_equally_far_in_every_direction_of_a_convolution() -> None:
    """And as far as AdamW would: 0.2 times the learning rate, root mean square."""
    net = model()
    weight = next(p for p in net.parameters() if p.ndim == 4 and p.shape[1] > 3)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rows = weight.shape[0]
    strengths = torch.logspace(0, -1, rows)[:, None]  # directions differ tenfold
    weight.grad = (strengths * torch.randn(rows, weight[0].numel(), generator=generator)).view_as(weight)
    before = weight.detach().clone()
    build_optimizer(TrainConfig(optimizer="muon", lr=0.1, weight_decay=0.0), net).step()
    step = (weight.detach() - before).flatten(1)
    values = torch.linalg.svdvals(step)
    assert values.min() > 0.4 * values.max()
    assert step.square().mean().sqrt() == pytest.approx(0.02, rel=0.3)

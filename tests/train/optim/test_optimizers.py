"""Each parameter has its optimizer, learning rate and weight decay; steps are what they should be."""

from typing import Any, get_args, get_type_hints

import pytest
import torch

from train.config import TrainConfig
from train.distributed import Ranks
from train.engine.state import build_state
from train.models.build import build_model
from train.models.classifier import ImageClassifier
from train.models.layers import layer_groups
from train.optim.optimizers import OPTIMIZERS, OptimizerEntry, build_optimizer, resolve_optimizer
from train.precision import Precision


def model() -> ImageClassifier:
    torch.manual_seed(0)
    return build_model("simple_cnn", 2, 16)[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("muon", 0.01, 0.05)),
        ({"weights": "w.pt"}, ("adamw", 1e-3, 0.05)),
        ({"optimizer": "sgd"}, ("sgd", 0.1, 5e-4)),
        ({"optimizer": "sgd", "weights": "w.pt", "lr": 0.0}, ("sgd", 0.0, 5e-4)),
        ({"lr": 0.3, "weight_decay": 0.0}, ("muon", 0.3, 0.0)),
    ],
)
def test_an_optimizer_has_its_usual_rates_unless_others_are_given(
    given: dict[str, Any], expected: tuple[str, float, float]
) -> None:
    config = resolve_optimizer(TrainConfig(**given))
    assert (config.optimizer, config.lr, config.weight_decay) == expected
    assert resolve_optimizer(config) == config


def test_the_settings_name_the_optimizers_that_there_are() -> None:
    assert get_args(get_type_hints(TrainConfig)["optimizer"]) == ("auto", *OPTIMIZERS)


def test_a_new_optimizer_is_an_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = OptimizerEntry(lambda groups, lr, *_: torch.optim.RMSprop(groups, lr), 0.03, 0.2)
    monkeypatch.setitem(OPTIMIZERS, "rmsprop", entry)
    optimizer = build_optimizer(TrainConfig().replace(optimizer="rmsprop"), model())
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.03, 0.2),
        (0.03, 0.0),
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
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


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_first_step_that_is_skipped_leaves_nothing_behind(name: str) -> None:
    """torch's fused SGD would start from uninitialised memory."""
    config = TrainConfig(optimizer=name, lr=0.01, schedule="constant", warmup_epochs=0)
    weights = []
    for skip_first in (False, True):
        torch.manual_seed(0)
        net = model()
        state = build_state(config, net, 10, Precision(), Ranks(), torch.device("cpu"))
        junk = [torch.full_like(p, 1e30) for p in net.parameters()]
        del junk  # what uninitialised memory is likely to be now
        for finite in ([False] if skip_first else []) + [True]:
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 if finite else torch.nan)
            state.batch_norm.save()
            assert bool(state.update(0.0)) == finite
        weights.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b)


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

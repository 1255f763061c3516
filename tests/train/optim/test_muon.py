"""Muon in stacks makes timm's steps, and a step that does not count leaves every bit as it was."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from timm.optim import muon
from torch import nn
from train_data import build

from train.config import TrainConfig
from train.distributed import Ranks
from train.models.classifier import ImageClassifier
from train.optim.muon import Muon, orthogonalised, shares
from train.optim.optimizers import build_optimizer
from train.precision import Precision

SETTINGS: dict[str, Any] = {
    "lr": 0.01,
    "momentum": 0.95,
    "ns_steps": 3,
    "ns_coefficients": "original",
    "adjust_lr_fn": "match_rms_adamw",
}


class Network(nn.Module):
    """Convolutions, also pointwise and depthwise, wide and tall matrices, and a head of few classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            [
                *(nn.Conv2d(8, 16, 3) for _ in range(3)),
                *(nn.Conv2d(16, 8, 1) for _ in range(2)),
                nn.Conv2d(16, 16, 3, groups=16),
                *(nn.Linear(8, 16) for _ in range(2)),
                nn.Linear(16, 8),
                nn.BatchNorm2d(16),
                nn.Linear(16, 2),
            ]
        )


def groups(network: nn.Module, nesterov: bool = False) -> list[dict[str, Any]]:
    """Groups of which that of the matrices alone has `nesterov`: timm would take NAdamW for others."""
    parameters = list(network.parameters())
    matrices = [p for p in parameters if muon._is_suitable_for_muon(p)]
    others = [p for p in parameters if p.ndim > 1 and not muon._is_suitable_for_muon(p)]
    return [
        {"params": matrices, "weight_decay": 0.1, "nesterov": nesterov},
        {"params": others, "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "lr": 0.02},
    ]


def set_gradients(network: nn.Module, seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        gradient = factor * torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def step_of_timm(optimizer: muon.Muon, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        usual = partial(muon.zeropower_via_newtonschulz, dtype=dtype)
        patched.setattr(muon, "zeropower_via_newtonschulz", usual)
        optimizer.step()


def parts(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Any]:
    """Weights and state by name."""
    state = optimizer.state_dict()["state"]
    values = {f"{i} {name}": value for i, part in state.items() for name, value in part.items()}
    return copy.deepcopy(dict(network.named_parameters()) | values)


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], bound: float) -> None:
    """Differences are `bound` times the largest number of a tensor at most."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, bool):
            assert ours[name] == value, name
        else:
            assert (ours[name] - value).abs().max() <= bound * value.abs().max(), name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "bound", "nesterov"),
    [(torch.float32, 2e-6, False), (torch.float32, 2e-6, True), (torch.bfloat16, 2e-2, True)],
)
def test_steps_are_those_of_timm(
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    bound: float,
    nesterov: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also after a state of timm's was loaded, and in stacks of a few matrices."""
    monkeypatch.setattr("train.optim.muon.STACKED", 2 * 16 * 72)
    ours, theirs = Network().to(memory_format=memory_format), Network().to(memory_format=memory_format)
    optimizer, reference = (
        Muon(groups(ours, nesterov), dtype=dtype, **SETTINGS),
        muon.Muon(groups(theirs, nesterov), **SETTINGS),
    )
    start = parts(optimizer, ours)
    for step in range(6):
        for network in (ours, theirs):
            set_gradients(network, step)
        optimizer.step()
        step_of_timm(reference, dtype, monkeypatch)
        if step == 2:
            assert optimizer.state_dict()["param_groups"] == reference.state_dict()["param_groups"]
            assert_close(parts(optimizer, ours), parts(reference, theirs), bound)
            optimizer = Muon(groups(ours, nesterov), dtype=dtype, **SETTINGS)
            optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    assert_close(parts(optimizer, ours), parts(reference, theirs), bound)
    moved = parts(optimizer, ours)
    assert all(
        isinstance(value, bool) or not torch.equal(value, moved[name]) for name, value in start.items()
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_skipped_step_leaves_every_bit_as_it_was(bad: float) -> None:
    network = Network().to(memory_format=torch.channels_last)
    optimizer = Muon(groups(network, nesterov=True), dtype=torch.float32, **SETTINGS)
    for found_inf, seed in ((0.0, 1), (1.0, 2), (0.0, 3)):
        before = parts(optimizer, network)
        set_gradients(network, seed, bad if found_inf else 1.0)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        after = parts(optimizer, network)
        same = {n for n, value in before.items() if isinstance(value, bool) or torch.equal(value, after[n])}
        assert (same == set(before)) == bool(found_inf)


def test_gradients_are_divided_by_their_scale() -> None:
    networks = Network(), Network()
    for network, scale in zip(networks, (None, 1024.0), strict=True):
        optimizer = Muon(groups(network, nesterov=True), dtype=torch.float32, **SETTINGS)
        set_gradients(network, 0, scale or 1.0)
        if scale:
            optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
    assert_close(*(dict(network.named_parameters()) for network in networks), bound=1e-6)


def test_a_state_of_another_layout_is_loaded_into_that_of_the_weights() -> None:
    """Kernels would take its numbers in another order."""
    plain, other = Network(), Network().to(memory_format=torch.channels_last)
    states = []
    for network in (plain, other):
        states.append(Muon(groups(network), dtype=torch.float32, **SETTINGS))
    set_gradients(plain, 0)
    states[0].step()
    other.load_state_dict(plain.state_dict())
    states[1].load_state_dict(copy.deepcopy(states[0].state_dict()))
    for network, optimizer in zip((plain, other), states, strict=True):
        set_gradients(network, 1)
        optimizer.step()
    assert_close(dict(other.named_parameters()), dict(plain.named_parameters()), bound=2e-6)


@pytest.mark.parametrize("autocast", ["", "float16", "bfloat16"])
def test_it_orthogonalises_in_float32_unless_training_is_in_bf16(
    autocast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever device a rank has: all must change the weights alike."""
    seen = set()

    def watched(*arguments: Any) -> torch.Tensor:
        seen.add(arguments[-1])
        return orthogonalised(*arguments)

    monkeypatch.setattr("train.optim.muon.orthogonalised", watched)
    network: ImageClassifier = build("simple_cnn", 2, 16)
    set_gradients(network, 0)
    build_optimizer(TrainConfig(optimizer="muon"), network, Precision(autocast)).step()
    assert seen == {torch.bfloat16 if autocast == "bfloat16" else torch.float32}


def test_equal_shapes_are_orthogonalised_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for each shape, turned or not: a GPU is launched as often for a deep network as for a flat
    one."""
    shapes = []

    def watched(matrices: torch.Tensor, *arguments: Any) -> torch.Tensor:
        shapes.append(tuple(matrices.shape))
        return orthogonalised(matrices, *arguments)

    monkeypatch.setattr("train.optim.muon.orthogonalised", watched)
    network = Network()
    set_gradients(network, 0)
    Muon(groups(network), dtype=torch.float32, **SETTINGS).step()
    assert sorted(shapes) == [(3, 16, 72), (5, 8, 16)]


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("columns", [8, 12, 100])
def test_the_iteration_is_timms_however_wide_a_matrix_is(columns: int, steps: int) -> None:
    wide = torch.randn(2, 8, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    coefficients = muon.resolve_ns_coefficients("quintic" if steps < 5 else "original", muon._COEFFICIENTS)
    ours = orthogonalised(wide, steps, coefficients, 1e-7, torch.float64)
    theirs = muon.zeropower_via_newtonschulz(wide, steps, coefficients, 1e-7, dtype=torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def three_steps(ranks: Ranks) -> dict[str, Any]:
    network = Network().to(memory_format=torch.channels_last)
    optimizer = Muon(groups(network), dtype=torch.float32, ranks=ranks, **SETTINGS)
    for step in range(3):
        set_gradients(network, step)
        optimizer.step()
    return parts(optimizer, network)


@pytest.mark.parametrize("processes", [2, 5])
def test_ranks_share_the_work_and_end_with_the_same_bits(processes: int, tmp_path: Path) -> None:
    """Five have more than there are matrices of some groups."""
    first, *others = on_ranks(three_steps, processes, tmp_path)
    assert_close(first, three_steps(Ranks()), bound=2e-6)
    for other in others:
        assert_close(other, first, bound=0.0)


def test_the_most_costly_matrices_are_of_different_ranks() -> None:
    assert shares((1, 9, 1, 10, 1), 2) == [[3, 2], [1, 0, 4]]
    assert shares((5,), 3) == [[0], [], []]

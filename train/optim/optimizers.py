"""Optimizers by name with their usual rates, and the groups of parameters that they step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import SGD, AdamW, Optimizer

from train.config import TrainConfig
from train.distributed import Ranks
from train.models.classifier import ImageClassifier
from train.models.layers import layer_groups
from train.optim.muon import Muon
from train.precision import Precision

NEWTON_SCHULZ_STEPS = 3  # of muon; the usual 5 cost ResNet-18 at 64 px a sixth of its speed

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer's constructor and its usual settings for batches of 128 images."""

    create: Callable[[Groups, float, Precision, Ranks], Optimizer]
    lr: float
    weight_decay: float


def _adamw(groups: Groups, lr: float, precision: Precision, ranks: Ranks) -> Optimizer:
    return AdamW(groups, lr=lr, fused=True)


def _sgd(groups: Groups, lr: float, precision: Precision, ranks: Ranks) -> Optimizer:
    optimizer = SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
    # torch makes these in the first step, and leaves them as uninitialised memory if that one is skipped
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _muon(groups: Groups, lr: float, precision: Precision, ranks: Ranks) -> Optimizer:
    """Return Muon: orthogonalised momentum for matrices and convolutions (flattened to [out, in * height *
    width]), scaled to the size of AdamW's steps (arXiv 2502.16982), and AdamW for biases, normalisation,
    depthwise convolutions and heads of few classes.

    It orthogonalises in float32 unless the whole step is in bf16, on every device: a processor without bf16
    arithmetic emulates it, five times as slowly, and all ranks must compute alike.
    """
    return Muon(
        groups,
        dtype=torch.bfloat16 if precision.autocast == "bfloat16" else torch.float32,
        ranks=ranks,
        lr=lr,
        momentum=0.9,
        nesterov=True,
        ns_steps=NEWTON_SCHULZ_STEPS,
        ns_coefficients="original",  # of all that timm has the nearest to orthogonal after so few
        adjust_lr_fn="match_rms_adamw",
    )


OPTIMIZERS = {
    "adamw": OptimizerEntry(_adamw, lr=1e-3, weight_decay=0.05),
    "sgd": OptimizerEntry(_sgd, lr=0.1, weight_decay=5e-4),
    "muon": OptimizerEntry(_muon, lr=0.01, weight_decay=0.05),
}
"""A new optimizer is an entry here, and its name among those of TrainConfig.optimizer."""


def resolve_optimizer(config: TrainConfig) -> TrainConfig:
    """Return the settings with the optimizer that `auto` stands for, and its usual rates where none are
    given."""
    name = config.optimizer
    if name == "auto":
        name = "adamw" if config.weights else "muon"
    usual = OPTIMIZERS[name]
    return config.replace(
        optimizer=name,
        lr=usual.lr if config.lr is None else config.lr,
        weight_decay=usual.weight_decay if config.weight_decay is None else config.weight_decay,
    )


def build_optimizer(
    config: TrainConfig,
    model: ImageClassifier,
    precision: Precision | None = None,
    ranks: Ranks | None = None,
) -> Optimizer:
    """Return the optimizer of a model's trainable parameters.

    Biases and normalisation layers (one dimension) have no weight decay. With `layer_decay`, a group of
    layers learns at `lr` times its power of the depth below the head (discriminative fine-tuning, arXiv
    1801.06146). The head's parameters come first.
    """
    config = resolve_optimizer(config)
    assert config.lr is not None
    parameters = {k: p for k, p in model.network.named_parameters() if p.requires_grad}
    by_depth = layer_groups(model.network)[::-1] if config.layer_decay != 1 else [list(parameters)]
    groups: Groups = []
    for depth, group in enumerate(by_depth):
        lr = config.lr * config.layer_decay**depth
        trained = [parameters[key] for key in group if key in parameters]
        decayed = [p for p in trained if p.ndim > 1]
        others = [p for p in trained if p.ndim <= 1]
        groups.append({"params": decayed, "weight_decay": config.weight_decay, "lr": lr})
        groups.append({"params": others, "weight_decay": 0.0, "lr": lr})
    groups = [g for g in groups if g["params"]]
    create = OPTIMIZERS[config.optimizer].create
    return create(groups, config.lr, precision or Precision(), ranks or Ranks())

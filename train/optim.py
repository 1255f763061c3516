"""Optimizer, parameter groups, learning-rate schedule and the moving average of the weights."""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from train.config import TrainConfig
from train.device import has_bf16
from train.layers import layer_groups
from train.model import ImageClassifier

NEWTON_SCHULZ_STEPS = 3  # of muon; the usual 5 cost ResNet-18 at 64 px a sixth of its speed
TensorList = tuple[Tensor, ...] | list[Tensor]


def build_optimizer(config: TrainConfig, model: ImageClassifier) -> Optimizer:
    """Weight decay for weights alone: biases and normalisation layers (one dimension) are left out.

    With `layer_decay`, a group of layers learns at `lr` times its power of the depth below the head
    (discriminative fine-tuning, arXiv 1801.06146). The head's parameters come first.
    """
    name, peak, weight_decay = config.optimizer_settings()
    parameters = {k: p for k, p in model.network.named_parameters() if p.requires_grad}
    by_depth = layer_groups(model.network)[::-1] if config.layer_decay != 1 else [list(parameters)]
    groups: list[dict[str, Any]] = []
    for depth, group in enumerate(by_depth):
        lr = peak * config.layer_decay**depth
        trained = [parameters[key] for key in group if key in parameters]
        decayed = [p for p in trained if p.ndim > 1]
        others = [p for p in trained if p.ndim <= 1]
        groups.append({"params": decayed, "weight_decay": weight_decay, "lr": lr})
        groups.append({"params": others, "weight_decay": 0.0, "lr": lr})
    groups = [g for g in groups if g["params"]]
    if name == "sgd":
        return SGD(groups, lr=peak, momentum=0.9, nesterov=True, fused=True)
    if name == "muon":
        return _muon(groups, peak)
    return AdamW(groups, lr=peak, fused=True)


def _muon(groups: list[dict[str, Any]], lr: float) -> Optimizer:
    """Orthogonalised momentum for matrices and convolutions (flattened to [out, in * height * width]),
    scaled to the size of AdamW's steps (arXiv 2502.16982); NAdamW for the rest, depthwise convolutions and
    heads of few classes among it."""
    from timm.optim import muon

    if groups[0]["params"][0].device.type == "cpu" and not has_bf16():
        # timm orthogonalises in bf16, which such a processor emulates: a step took five times as long
        exact = functools.partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
        muon.zeropower_via_newtonschulz = exact
    return muon.Muon(
        groups,
        lr=lr,
        momentum=0.95,
        ns_steps=NEWTON_SCHULZ_STEPS,
        ns_coefficients="original",  # of all that timm has the nearest to orthogonal after so few
        adjust_lr_fn="match_rms_adamw",
    )


def lr_factor(step: int, config: TrainConfig, steps_per_epoch: int) -> float:
    """Share of the peak learning rate at an optimizer step: linear warm-up, then cosine to 0 (arXiv
    1608.03983, without restarts) or constant."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    total = config.epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_scheduler(config: TrainConfig, optimizer: Optimizer, steps_per_epoch: int) -> LambdaLR:
    """Stepped once an optimizer step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, config, steps_per_epoch))


def build_ema(config: TrainConfig, model: nn.Module) -> AveragedModel | None:
    """Moving average of weights and batch-norm statistics; its decay grows with the steps taken, as in
    TensorFlow's ExponentialMovingAverage, so that a short run's average has left the initial weights."""
    if not config.ema:
        return None

    @torch.no_grad()
    def update(averaged: TensorList, current: TensorList, num_averaged: Tensor | int) -> None:
        steps = int(ema.n_averaged)  # `num_averaged` is its copy on the device
        decay = min(config.ema, (1 + steps) / (10 + steps))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:  # num_batches_tracked
            torch._foreach_copy_(averaged, current)

    ema = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    ema.n_averaged = ema.n_averaged.cpu()  # read each step: must not make the device wait
    return ema

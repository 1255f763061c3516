"""Optimizer, parameter groups, learning-rate schedule and the moving average of the weights."""

import math

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from train.config import TrainConfig

TensorList = tuple[Tensor, ...] | list[Tensor]


def build_optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    """Weight decay for weights alone: biases and normalisation layers (one dimension) are left out."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return SGD(groups, lr=config.lr, momentum=0.9, nesterov=True, fused=True)
    return AdamW(groups, lr=config.lr, fused=True)


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

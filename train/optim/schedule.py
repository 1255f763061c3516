"""The learning rate's schedule: linear warm-up, then cosine or constant."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from train.config import TrainConfig


def lr_factor(step: int, config: TrainConfig, steps_per_epoch: int) -> float:
    """Return the share of the peak learning rate at an optimizer step.

    Linear warm-up, for half of the steps at most, then cosine to 0 (arXiv 1608.03983, without restarts) or
    constant.
    """
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total // 2)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_scheduler(config: TrainConfig, optimizer: Optimizer, steps_per_epoch: int) -> LambdaLR:
    """Return the scheduler, which is stepped once an optimizer step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, config, steps_per_epoch))

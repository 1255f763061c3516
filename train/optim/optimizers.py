"""Optimizer, parameter groups, learning-rate schedule and the moving average of the weights."""

import functools
import math
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from train.config import TrainConfig
from train.models.classifier import ImageClassifier
from train.models.layers import layer_groups
from train.precision import Precision

NEWTON_SCHULZ_STEPS = 3  # of muon; the usual 5 cost ResNet-18 at 64 px a sixth of its speed


def build_optimizer(
    config: TrainConfig, model: ImageClassifier, precision: Precision | None = None
) -> Optimizer:
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
        return _sgd(groups, peak)
    if name == "muon":
        return _muon(groups, peak, precision or Precision())
    return AdamW(groups, lr=peak, fused=True)


def _sgd(groups: list[dict[str, Any]], lr: float) -> Optimizer:
    optimizer = SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
    # torch makes these in the first step, and leaves them as uninitialised memory if that one is skipped
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _muon(groups: list[dict[str, Any]], lr: float, precision: Precision) -> Optimizer:
    """Orthogonalised momentum for matrices and convolutions (flattened to [out, in * height * width]),
    scaled to the size of AdamW's steps (arXiv 2502.16982); NAdamW for the rest, depthwise convolutions and
    heads of few classes among it.

    timm orthogonalises in bf16. On a processor that is done in float32 unless the whole step is in bf16:
    one without bf16 arithmetic emulates it, five times as slowly, and all ranks must do the same.
    """
    from timm.optim import muon

    class Float32Muon(muon.Muon):
        def step(self, closure: Any = None) -> Any:
            usual = muon.zeropower_via_newtonschulz
            muon.zeropower_via_newtonschulz = functools.partial(usual, dtype=torch.float32)
            try:
                return super().step(closure)  # type: ignore[no-untyped-call]
            finally:
                muon.zeropower_via_newtonschulz = usual

    in_float32 = groups[0]["params"][0].device.type == "cpu" and precision.autocast != "bfloat16"
    optimizer: Optimizer = (Float32Muon if in_float32 else muon.Muon)(
        groups,
        lr=lr,
        momentum=0.95,
        ns_steps=NEWTON_SCHULZ_STEPS,
        ns_coefficients="original",  # of all that timm has the nearest to orthogonal after so few
        adjust_lr_fn="match_rms_adamw",
    )
    return optimizer


def lr_factor(step: int, config: TrainConfig, steps_per_epoch: int) -> float:
    """Share of the peak learning rate at an optimizer step: linear warm-up, for half of the steps at most,
    then cosine to 0 (arXiv 1608.03983, without restarts) or constant."""
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total // 2)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_scheduler(config: TrainConfig, optimizer: Optimizer, steps_per_epoch: int) -> LambdaLR:
    """Stepped once an optimizer step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, config, steps_per_epoch))


class MovingAverage(AveragedModel):
    """Of weights and batch-norm statistics; its decay grows with the steps taken, as in TensorFlow's
    ExponentialMovingAverage, so that a short run's average has left the initial weights.

    The number of steps is on the CPU, and torch's own `update_parameters` would copy it to the device, and
    wait for that, for every kind of tensor.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay
        self.n_averaged = self.n_averaged.cpu()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        steps = int(self.n_averaged)
        decay = min(self.decay, (1 + steps) / (10 + steps))
        ours, theirs = (list(chain(m.parameters(), m.buffers())) for m in (self.module, model))
        copied = [i for i, tensor in enumerate(ours) if not steps or not tensor.is_floating_point()]
        mixed = sorted(set(range(len(ours))) - set(copied))
        if copied:  # num_batches_tracked; in the first step all
            torch._foreach_copy_([ours[i] for i in copied], [theirs[i] for i in copied])
        if mixed:
            torch._foreach_lerp_([ours[i] for i in mixed], [theirs[i] for i in mixed], 1 - decay)
        self.n_averaged += 1


def build_ema(config: TrainConfig, model: nn.Module) -> MovingAverage | None:
    return MovingAverage(model, config.ema) if config.ema else None

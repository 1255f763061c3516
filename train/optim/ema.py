"""Exponential moving average of a model's weights and batch-norm statistics."""

from itertools import chain

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """A moving average whose decay grows with the steps taken, as in TensorFlow's
    ExponentialMovingAverage, so that a short run's average has left the initial weights.

    The number of steps is on the CPU: torch's own `update_parameters` copies it to the device for every
    kind of tensor, and waits for that.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay
        self.n_averaged = self.n_averaged.cpu()
        tensors = chain(self.module.parameters(), self.module.buffers())
        self.infinite = {i for i, t in enumerate(tensors) if t.is_floating_point() and t.isinf().any()}
        """Of bounds, as timm's Gemma 4 has them: the mean of two of them is not a number."""

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        steps = int(self.n_averaged)
        decay = min(self.decay, (1 + steps) / (10 + steps))
        ours, theirs = (list(chain(m.parameters(), m.buffers())) for m in (self.module, model))
        copied = [
            i
            for i, tensor in enumerate(ours)
            if not steps or i in self.infinite or not tensor.is_floating_point()
        ]
        mixed = sorted(set(range(len(ours))) - set(copied))
        if copied:  # num_batches_tracked; in the first step all
            torch._foreach_copy_([ours[i] for i in copied], [theirs[i] for i in copied])
        if mixed:
            torch._foreach_lerp_([ours[i] for i in mixed], [theirs[i] for i in mixed], 1 - decay)
        self.n_averaged += 1

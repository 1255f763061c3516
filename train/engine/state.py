"""TrainState: the model and all that changes with it, step by step."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the one base of all batch norms; it has no public name
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from serve.contract.errors import UserError
from train.config import TrainConfig
from train.distributed import Ranks, gather_rows, mean_over_ranks, wrap
from train.models.classifier import ImageClassifier
from train.models.convolutions import convolutions
from train.optim.ema import MovingAverage
from train.optim.optimizers import build_optimizer
from train.optim.schedule import build_scheduler
from train.precision import Precision

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
FIRST_SCALE = 2.0**10  # of fp16 losses; torch's 2**16 overflows in the first steps, all of a short epoch's
MIN_MOMENTUM = 0.1  # of batch-norm statistics, from random weights; PyTorch's own default


class BatchNormBackup:
    """Copies of the batch-norm buffers, for steps that turn out not to count."""

    def __init__(self, model: nn.Module):
        layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        statistics, counts = (
            [b for b in buffers if b.is_floating_point() == floats] for floats in (True, False)
        )
        self.groups = [(group, [b.clone() for b in group]) for group in (statistics, counts) if group]

    def save(self) -> None:
        for buffers, copies in self.groups:
            torch._foreach_copy_(copies, buffers)  # one kernel for all; no public function has that

    def restore(self) -> None:
        for buffers, copies in self.groups:
            torch._foreach_copy_(buffers, copies)

    def restore_unless(self, finite: Tensor) -> None:
        """Restore where the bool [] is False, without waiting for a GPU to know it."""
        for buffer, copy in (pair for group in self.groups for pair in zip(*group, strict=True)):
            torch.where(finite, buffer, copy, out=buffer)


@dataclass
class TrainState:
    model: ImageClassifier
    """The bare module."""
    wrapped: nn.Module
    """What training calls: DistributedDataParallel around the model."""
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    ema: MovingAverage | None
    precision: Precision
    convolutions: AbstractContextManager[Any] = field(default_factory=nullcontext)
    """How forward passes compute theirs."""

    def __post_init__(self) -> None:
        self.batch_norm = BatchNormBackup(self.model)

    @property
    def evaluated(self) -> ImageClassifier:
        """The model that is validated and exported: the moving average if there is one."""
        if self.ema is None:
            return self.model
        assert isinstance(self.ema.module, ImageClassifier)
        return self.ema.module

    def begin_epoch(self, epoch: int, config: TrainConfig) -> None:
        """Put the model into training mode, and switch its subject crop for the epoch, counted from 0."""
        self.model.train()
        for model in (self.model, self.evaluated):
            if model.subject is not None:
                model.subject.active = config.crops_subject(epoch)

    def forward(self, images: Tensor) -> Any:
        """Return logits, or `Outputs` of a network with auxiliary heads."""
        with self._autocast(images), self.convolutions:
            return self.wrapped(images)

    @torch.no_grad()
    def teacher_logits(self, teacher: nn.Module, images: Tensor) -> Tensor:
        """Return a teacher's logits, in the precision of training."""
        with self._autocast(images), self.convolutions:
            logits: Tensor = teacher(images)
        return logits

    def _autocast(self, images: Tensor) -> torch.autocast:
        enabled = bool(self.precision.autocast)
        return torch.autocast(images.device.type, self.precision.dtype, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self, clip_grad: float) -> Tensor:
        """Step the optimizer with the accumulated gradients, then the schedule and the moving average.

        Returns whether the gradients were finite, a bool [] on the device. When they were not, weights,
        moments and batch-norm statistics stay as they were before the step. The device is not waited for,
        as the optimizers know torch's mark for skipped steps. Gradients are sums over all ranks, so that
        all ranks decide alike.
        """
        if clip_grad:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip_grad)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        finite = norm.isfinite()
        if self.scaler.is_enabled():  # it checks the gradients itself, and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            fused: Any = self.optimizer  # fused optimizers skip a step by this mark, on the device
            fused.grad_scale, fused.found_inf = None, (~finite).float()
            self.optimizer.step()
        self.batch_norm.restore_unless(finite)
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return finite

    def _buffers(self) -> list[Tensor]:
        """Return the buffers that can differ between ranks: statistics of floats, among constants."""
        models = [self.model] if self.ema is None else [self.model, self.ema.module]
        return [b for model in models for b in model.buffers() if b.is_floating_point()]

    def statistics(self) -> Tensor:
        """Return the batch-norm statistics of the model and of its moving average, float64 [n]."""
        return torch.cat([buffer.flatten().double() for buffer in self._buffers()])

    def set_statistics(self, values: Tensor) -> None:
        buffers = self._buffers()
        for buffer, part in zip(buffers, torch.split(values, [b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def average_statistics(self) -> None:
        """Average the batch-norm statistics over the ranks. Every rank must call it.

        The mean of running means is that of the whole batches. The mean of running variances is without
        the variance between the ranks' means, as is each rank's normalisation in training: with n images a
        rank it is lower by about 1 / n at most.
        """
        if self.wrapped is not self.model:  # of several ranks
            self.set_statistics(mean_over_ranks(self.statistics()))

    def statistics_of_ranks(self, ranks: Ranks) -> Tensor | None:
        """Return what `load_statistics` needs within an epoch, float64 [world_size, n], on rank 0;
        None on the others, and where a single process has no other's. Every rank must call it."""
        return None if ranks.world_size == 1 else gather_rows(self.statistics()[None].cpu(), ranks)

    def load_statistics(self, rows: Tensor, ranks: Ranks) -> None:
        """Load this rank's batch-norm statistics, or the mean of those of another number of ranks."""
        values = rows[ranks.rank] if len(rows) == ranks.world_size else rows.mean(0)
        self.set_statistics(values.to(self.model.mean.device))

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, under names without the prefixes of wrappers."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_steps": 0 if self.ema is None else int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "precision": asdict(self.precision),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a checkpoint; learning rates follow the present schedule, which may have more epochs.

        Raises:
            UserError: the checkpoint has a moving average and this state none, or the reverse.
        """
        if (state["ema"] is None) != (self.ema is None):
            raise UserError("--ema cannot be turned on or off in a resumed run: start a new run for that")
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(state["ema_steps"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        rates = self.rates(self.scheduler.last_epoch)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    @property
    def last_lr(self) -> float:
        """Learning rate of the last step that was done, of the head."""
        return self.rates(self.scheduler.last_epoch - 1)[0]

    def rates(self, step: int) -> list[float]:
        """Return the learning rates of the parameter groups at an optimizer step of the run."""
        groups = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        return [float(base) * share(step) for base, share in groups]


def build_state(
    config: TrainConfig,
    model: ImageClassifier,
    steps_per_epoch: int,
    precision: Precision,
    ranks: Ranks,
    device: torch.device,
) -> TrainState:
    """Return the state before the first step. The model is changed in place."""
    if not config.weights:
        raise_momentum(model)
    model.channels_last = precision.channels_last
    model.to(memory_format=precision.memory_format)
    optimizer = build_optimizer(config, model, precision, ranks)
    compiled = precision.compiled if config.compile == "auto" else bool(config.compile)
    if compiled:
        # what is compiled is kept for later starts, unless the user has chosen a folder
        os.environ.setdefault(CACHE_VARIABLE, str(Path(config.output, ".cache", "inductor").resolve()))
        # in place: names, copies and the averaged model stay as they are
        model.network.compile(dynamic=False)
    return TrainState(
        model=model,
        wrapped=wrap(model, ranks, device),
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, steps_per_epoch),
        scaler=torch.amp.GradScaler(device.type, FIRST_SCALE, enabled=precision.autocast == "float16"),
        ema=MovingAverage(model, config.ema) if config.ema else None,
        precision=precision,
        convolutions=convolutions(precision, device, compiled),
    )


def raise_momentum(model: nn.Module) -> None:
    """Let batch-norm statistics follow random weights within tens of steps.

    torchvision's MobileNetV3 and EfficientNet-B5 come with a momentum of 0.01, its MNASNet with 0.0003,
    meant for tens of thousands of steps: in a run of hundreds, statistics that began at 0 and 1 never catch
    up. What is evaluated is an average over the last steps in any case.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.momentum:
            module.momentum = max(module.momentum, MIN_MOMENTUM)

"""Everything that a run changes while it trains, and how it is saved and restored."""

import importlib.metadata
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from serve.contract.errors import UserError
from train.checkpoint import best_checkpoint
from train.config import TrainConfig
from train.data.index import Data
from train.distributed import Ranks, wrap
from train.models.classifier import ImageClassifier
from train.optim.ema import MovingAverage, build_ema
from train.optim.optimizers import build_optimizer
from train.optim.schedule import build_scheduler, lr_factor
from train.precision import Precision
from train.runs.history import History, changed_settings, is_retuning
from train.runs.snapshots import Position

LEAST_MOMENTUM = 0.1  # of batch-norm statistics, from random weights; PyTorch's own default
VERSIONS_OF = ("torch", "torchvision", "timm", "numpy", "pillow")


@dataclass
class Trainee:
    model: ImageClassifier
    """The bare module."""
    wrapped: nn.Module
    """What training calls: DistributedDataParallel around the model."""
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    ema: MovingAverage | None
    precision: Precision

    def __post_init__(self) -> None:
        self.statistics = [
            buffer
            for module in self.model.modules()
            if isinstance(module, _BatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        self.kept = [buffer.clone() for buffer in self.statistics]
        batch_norms = (module for module in self.model.modules() if isinstance(module, _BatchNorm))
        self.counts = [m.num_batches_tracked for m in batch_norms if m.num_batches_tracked is not None]
        self.kept_counts = [count.clone() for count in self.counts]

    @property
    def evaluated(self) -> ImageClassifier:
        """What is validated, and exported from the best checkpoint."""
        if self.ema is None:
            return self.model
        assert isinstance(self.ema.module, ImageClassifier)
        return self.ema.module

    def begin_epoch(self, epoch: int, config: TrainConfig) -> None:
        """What depends on the epoch, counted from 0: whether the subject is looked for."""
        for model in (self.model, self.evaluated):
            if model.subject is not None:
                model.subject.active = config.crops_subject(epoch)

    @torch.no_grad()
    def begin_step(self) -> None:
        """Keep batch-norm statistics, in case that this step turns out not to count."""
        if self.statistics:
            torch._foreach_copy_(self.kept, self.statistics)
        if self.counts:
            torch._foreach_copy_(self.kept_counts, self.counts)

    def forward(self, images: Tensor) -> Any:
        """The training forward pass: logits, or `Outputs` of a network with auxiliary heads."""
        with self._autocast(images):
            return self.wrapped(images)

    @torch.no_grad()
    def ask(self, teacher: nn.Module, images: Tensor) -> Tensor:
        """A teacher's logits, in the precision of training."""
        with self._autocast(images):
            logits: Tensor = teacher(images)
        return logits

    def _autocast(self, images: Tensor) -> torch.autocast:
        autocast = self.precision.autocast
        return torch.autocast(images.device.type, self.precision.dtype, enabled=bool(autocast))

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self, clip_grad: float) -> Tensor:
        """One optimizer step with the gradients gathered, then the schedule's and the average's.

        Returns whether the gradients were finite, a bool [] on the device that nobody waits for here (but
        muon and the scaler of fp16, which leave out a step no other way). When they were not, weights,
        moments and batch-norm statistics stay as they were before the step. Gradients are sums over all
        ranks, so that all ranks decide alike.
        """
        if clip_grad:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip_grad)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        finite = norm.isfinite()
        if self.scaler.is_enabled():  # it finds out by itself, and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.defaults.get("fused"):
            fused: Any = self.optimizer  # fused optimizers leave out a step by this mark, on the device
            fused.grad_scale, fused.found_inf = None, (~finite).float()
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        self._restore_statistics(finite)
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return finite

    @torch.no_grad()
    def abandon_step(self) -> None:
        """Undo what the forward passes of a step that will not be finished have changed."""
        for changed, kept in ((self.statistics, self.kept), (self.counts, self.kept_counts)):
            if changed:
                torch._foreach_copy_(changed, kept)

    @torch.no_grad()
    def _restore_statistics(self, finite: Tensor) -> None:
        if finite.device.type == "cpu":
            if self.statistics and not finite:
                torch._foreach_copy_(self.statistics, self.kept)
            return
        for buffer, kept in zip(self.statistics, self.kept, strict=True):
            torch.where(finite, buffer, kept, out=buffer)

    def state_dict(self) -> dict[str, Any]:
        """Names without prefixes of wrappers."""
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
        if (state["ema"] is None) != (self.ema is None):
            raise UserError("--ema cannot be turned on or off in a resumed run")
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(state["ema_steps"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self._follow_schedule()

    def _follow_schedule(self) -> None:
        """Set the learning rates of the next step by the schedule of now: with more epochs than were
        planned, it is not the one that set those which were saved."""
        rates = self.rates(self.scheduler.last_epoch)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def rates(self, step: int) -> list[float]:
        """Learning rates of the parameter groups at an optimizer step of the run."""
        of_groups = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        return [float(base) * share(step) for base, share in of_groups]


def build_trainee(
    config: TrainConfig,
    model: ImageClassifier,
    steps_per_epoch: int,
    precision: Precision,
    ranks: Ranks,
    device: torch.device,
) -> Trainee:
    if not config.weights:
        _quicken_statistics(model)
    model.channels_last = precision.channels_last
    model.to(memory_format=precision.memory_format)
    optimizer = build_optimizer(config, model, precision)
    if config.compile:  # in place: names, copies and the averaged model stay as they are
        model.network.compile(dynamic=False)
    return Trainee(
        model=model,
        wrapped=wrap(model, ranks, device),
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, steps_per_epoch),
        scaler=torch.amp.GradScaler(device.type, enabled=precision.autocast == "float16"),
        ema=build_ema(config, model),
        precision=precision,
    )


def _quicken_statistics(model: nn.Module) -> None:
    """torchvision's MobileNetV3 and EfficientNet-B5 come with a momentum of 0.01, its MNASNet with 0.0003,
    meant for tens of thousands of steps: in a run of hundreds, statistics that began at 0 and 1 never catch
    up with random weights. What is evaluated is an average over the last steps in any case."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.momentum:
            module.momentum = max(module.momentum, LEAST_MOMENTUM)


def checkpoint_state(
    trainee: Trainee,
    history: History,
    data: Data,
    config: TrainConfig,
    run_id: str,
    position: Position | None = None,
) -> dict[str, Any]:
    """Tensors and plain types: all that a run needs to go on, and all that an export needs."""
    return {
        **trainee.state_dict(),
        "history": asdict(history),
        "epoch": history.epochs_done,
        "position": asdict(position or Position()),
        "config": config.to_dict(),
        "class_names": list(data.train.class_names),
        "preprocess": config.preprocess().to_dict(),
        "crops_subject": trainee.model.subject is not None and trainee.model.subject.active,
        "data_digest": data.digest,
        "content_digest": data.content_digest,
        "val_root": str(data.val.root.resolve()),
        "run_id": run_id,
        "run_name": config.name,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS_OF},
    }


def restore(state: dict[str, Any], trainee: Trainee, data: Data, config: TrainConfig) -> History:
    """Load a checkpoint into the trainee.

    Raises:
        UserError: the data or a setting changed, so that this would be another run.
    """
    saved = state["config"]
    changed = changed_settings(saved, config)
    if changed:
        raise UserError(f"a resumed run keeps its settings, and these differ: {changed}; start a new run")
    if state["data_digest"] != data.digest:
        raise UserError(
            f"the data of this run changed since it started (digest {state['data_digest'][:12]} -> "
            f"{data.digest[:12]}): restore the data, or start a new run from its weights with --weights"
        )
    if is_retuning(state) and config.epochs != saved["epochs"]:
        raise UserError("--epochs cannot change once a run is being re-tuned; start a new run")
    history = History(**state["history"])
    if is_retuning(state) and not history.retuning(config):
        raise UserError(
            f"this run is being re-tuned, which with --patience {config.patience} and --retune_epochs "
            f"{config.retune_epochs} would not have begun; keep --patience {saved['patience']} and "
            f"--retune_epochs {saved['retune_epochs']}, or start a new run"
        )
    if config.epochs < min(state["epoch"], saved["epochs"]):
        raise UserError(
            f"--epochs {config.epochs} is less than the {state['epoch']} that this run has done; give "
            f"{state['epoch']} to end it as it is"
        )
    trainee.load_state_dict(state)
    return history


def schedule_change(state: dict[str, Any], trainee: Trainee, config: TrainConfig, steps: int) -> str:
    """A sentence on what other --epochs than the checkpoint's do to the learning rate; "" if nothing. An
    epoch has so many `steps`."""
    before, step = config.replace(epochs=state["config"]["epochs"]), trainee.scheduler.last_epoch
    planned, now = (lr_factor(step, c, steps) for c in (before, config))
    if not 0 < step < config.epochs * steps or planned == now:
        return ""
    peak = trainee.scheduler.base_lrs[0]
    last, following = peak * lr_factor(step - 1, before, steps), peak * now
    rises = following > last
    text = (
        f"--epochs {before.epochs} -> {config.epochs}: the {config.schedule} schedule is stretched to "
        f"{config.epochs} epochs, and the learning rate {'rises' if rises else 'falls'} from {last:.2e} to "
        f"{following:.2e} at the next step"
    )
    best = best_checkpoint(f"{config.output}/{config.name}")
    cure = f"to keep it low, start a new run with --weights {best} and a low --lr"
    return f"warning: {text}; {cure}" if rises else text

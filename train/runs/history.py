"""History: how far a run is, which epoch was best, and which settings may change when it is resumed."""

import math
from dataclasses import dataclass, field
from typing import Any

from train.config import SETTINGS, TrainConfig
from train.settings import flag


@dataclass
class History:
    """Epochs that are done, and the best of them."""

    epochs_done: int = 0
    best_epoch: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Validation metrics of the best epoch, val/NAME -> value."""
    retuned: int = 0
    """Those of `epochs_done` that re-tuned the head (train/engine/retune.py)."""

    def validates(self, config: TrainConfig) -> bool:
        """Return whether the next epoch ends with a validation."""
        left = config.epochs - self.epochs_done - 1
        return not self.best or left <= 0 or left % config.val_interval == 0 or self.retuning(config)

    def update(self, metrics: dict[str, float], config: TrainConfig) -> bool:
        """Count an epoch; return whether it is the best so far. Its metrics may lack a validation."""

        def rank(m: dict[str, float]) -> tuple[float, float]:
            loss = -m["val/log_loss_calibrated" if config.calibrate else "val/log_loss"]
            loss = loss if loss == loss else -math.inf  # NaN would stay the best for ever
            accuracy = m["val/accuracy"]
            return (accuracy, loss) if config.best_by == "accuracy" else (loss, accuracy)

        self.retuned += self.retuning(config)
        self.epochs_done += 1
        improved = "val/accuracy" in metrics and (not self.best or rank(metrics) > rank(self.best))
        if improved:
            self.best, self.best_epoch = metrics, self.epochs_done
        return improved

    def trained(self, config: TrainConfig) -> bool:
        """Return whether all epochs before re-tuning are done, or `patience` is used up."""
        stale = self.epochs_done - self.best_epoch
        return self.epochs_done >= config.epochs or bool(config.patience and stale >= config.patience)

    def retuning(self, config: TrainConfig) -> bool:
        """Return whether the next epoch is one of re-tuning; none of training follows."""
        return bool(config.retune_epochs) and (self.trained(config) or self.retuned > 0)

    def complete(self, config: TrainConfig) -> bool:
        """Return whether all epochs are done."""
        if config.retune_epochs:
            return self.retuned >= config.retune_epochs
        return self.trained(config)

    def stopped(self, config: TrainConfig) -> bool:
        """Return whether the run is complete, or at `stop_after`."""
        return self.complete(config) or bool(config.stop_after and self.epochs_done >= config.stop_after)


def changed_settings(saved: dict[str, Any], config: TrainConfig) -> str:
    """Return the changes that make it another run, as "--lr 0.1 -> 0.2, ..."."""
    return ", ".join(
        f"{flag(name)} {saved[name]!r} -> {value!r}"
        for name, value in config.to_dict().items()
        if not SETTINGS[name].resumable and saved.get(name, value) != value
    )


def is_retuning(state: dict[str, Any]) -> bool:
    """Return whether a checkpoint is of the last stage, whose optimizer has the head's parameters alone."""
    return bool(state["history"]["retuned"] or state["position"]["retuning"])

"""How far a run is, which epoch was best, and what may change when it is resumed."""

import math
from dataclasses import dataclass, field
from typing import Any

from train.config import SETTINGS, TrainConfig
from train.settings import flag


@dataclass
class History:
    """How far the run is, and which epoch was best."""

    epochs_done: int = 0
    best_epoch: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Validation metrics of the best epoch, val/NAME -> value."""
    retuned: int = 0
    """Of `epochs_done`, those of the last stage, that of train/engine/retune.py."""

    def validates(self, config: TrainConfig) -> bool:
        """Whether the next epoch ends with a validation."""
        left = config.epochs - self.epochs_done - 1
        return not self.best or left <= 0 or left % config.val_interval == 0 or self.retuning(config)

    def update(self, metrics: dict[str, float], config: TrainConfig) -> bool:
        """Count an epoch; True when it is the best so far (equal accuracy: lower log loss wins). Without a
        validation, `metrics` lacks val/accuracy."""

        def rank(m: dict[str, float]) -> tuple[float, float]:
            accuracy, loss = (
                m["val/accuracy"],
                -m[f"val/log_loss{'_calibrated' if config.calibrate else ''}"],
            )
            loss = loss if loss == loss else -math.inf  # NaN would stay the best for ever
            return (accuracy, loss) if config.best_by == "accuracy" else (loss, accuracy)

        self.retuned += self.retuning(config)
        self.epochs_done += 1
        improved = "val/accuracy" in metrics and (not self.best or rank(metrics) > rank(self.best))
        if improved:
            self.best, self.best_epoch = metrics, self.epochs_done
        return improved

    def retuning(self, config: TrainConfig) -> bool:
        """All epochs are done or `patience` is used up, and those of re-tuning are next or have begun."""
        stale = self.epochs_done - self.best_epoch
        over = self.epochs_done >= config.epochs or bool(config.patience and stale >= config.patience)
        return bool(config.retune_epochs) and (over or self.retuned > 0)

    def complete(self, config: TrainConfig) -> bool:
        if config.retune_epochs:
            return self.retuned >= config.retune_epochs
        stale = self.epochs_done - self.best_epoch
        return self.epochs_done >= config.epochs or bool(config.patience and stale >= config.patience)

    def stopped(self, config: TrainConfig) -> bool:
        """Complete, or at `stop_after`."""
        return self.complete(config) or bool(config.stop_after and self.epochs_done >= config.stop_after)


def changed_settings(saved: dict[str, Any], config: TrainConfig) -> str:
    """Return the changes that make it another run, as "--lr 0.1 -> 0.2, ..."."""
    return ", ".join(
        f"{flag(name)} {saved[name]!r} -> {value!r}"
        for name, value in config.to_dict().items()
        if not SETTINGS[name].resumable and saved.get(name, value) != value
    )


def is_retuning(state: dict[str, Any]) -> bool:
    """A checkpoint of the last stage, whose optimizer has the head's parameters alone."""
    return bool(state["history"]["retuned"] or state.get("position", {}).get("retuning"))

"""TrainingRun: everything that one rank trains with."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from train.config import TrainConfig
from train.data.device_cache import DeviceLoader
from train.data.index import Data
from train.data.loader import Loader
from train.data.pixel_cache import training_entries
from train.data.sampler import EpochPlan
from train.distributed import Ranks
from train.engine.loss import Criterion
from train.engine.state import TrainState
from train.models.classifier import ImageClassifier
from train.models.zoo import drop_path_of, dropout_of
from train.runs.history import History
from train.runs.snapshots import Position


@dataclass
class TrainingRun:
    """Only `stage`, `train_loader`, `state` and `history` change while it trains."""

    config: TrainConfig
    stage: TrainConfig
    """Settings of the epochs that are under way: the run's, or those of re-tuning."""
    data: Data
    ranks: Ranks
    device: torch.device
    plan: EpochPlan
    criterion: Criterion
    state: TrainState
    train_loader: Loader
    val_loader: Loader
    history: History = field(default_factory=History)
    position: Position = field(default_factory=Position)
    """Position in the first epoch; later ones begin at their start."""
    teacher: ImageClassifier | None = None
    """A model that sees the very pixels that are trained on (arXiv 2106.05237)."""
    soft_targets: Tensor | None = None
    """float32 [training images, num_classes] on the device, in place of the labels in the loss."""

    @property
    def num_classes(self) -> int:
        return len(self.data.train.class_names)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.state.model.parameters())

    @property
    def is_retuning(self) -> bool:
        return self.stage is not self.config

    def __str__(self) -> str:
        processes, threads = self.ranks.world_size, torch.get_num_threads()
        return (
            f"{self.config.name}: {self.config.model} with {self.num_parameters:,} parameters, "
            f"{processes} process{'es' if processes > 1 else ''} of {threads} "
            f"thread{'s' if threads > 1 else ''} on {self.device.type}, "
            f"{self.state.precision}"
        )

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that MLflow gets: settings, and what this run is of."""
        return {
            **self.config.to_dict(),
            **self.used_settings(),
            "world_size": self.ranks.world_size,
            "num_parameters": self.num_parameters,
            "num_classes": self.num_classes,
            "num_train": len(self.data.train),
            "num_val": len(self.data.val),
            "data_digest": self.data.digest,
        }

    def used_settings(self) -> dict[str, Any]:
        """Return values of the settings that leave a choice to the start of a run, as it was made."""
        config, precision, loader = self.config, self.state.precision, self.train_loader
        stored = loader.dataset.cache is not None
        entries = training_entries(config).settings if stored else {}
        network = self.state.model.network
        return {
            "eval_size": config.preprocess().size,
            "dropout": dropout_of(network),
            "drop_path": drop_path_of(network),
            "device": self.device.type,
            "precision": precision.name,
            "channels_last": precision.channels_last,
            "compile": precision.compiled if config.compile == "auto" else config.compile,
            "num_workers": loader.num_workers,
            "pixel_cache": "device" if isinstance(loader, DeviceLoader) else "on" if stored else "off",
            "cache_size": entries.get("short_side", 0),
        }

"""TrainingRun: everything that one rank trains with."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from train.config import TrainConfig
from train.data.device_cache import AnyLoader
from train.data.index import Data
from train.data.sampler import EpochPlan
from train.distributed import Ranks
from train.engine.loss import Criterion
from train.engine.state import TrainState
from train.models.classifier import ImageClassifier
from train.runs.history import History
from train.runs.snapshots import Position
from train.tracking.contents import parameters


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
    train_loader: AnyLoader
    val_loader: AnyLoader
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
        return (
            f"{self.config.name}: {self.config.model} with {self.num_parameters:,} parameters, "
            f"{self.ranks.world_size} processes x {torch.get_num_threads()} threads on {self.device.type}, "
            f"{self.state.precision}"
        )

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that MLflow gets."""
        world_size, precision = self.ranks.world_size, str(self.state.precision)
        return parameters(self.config, self.data, world_size, precision, self.num_parameters)

"""Tiny labelled data sets, states and runs for the tests of train/."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from train.config import TrainConfig
from train.data.augment import ImageAugment
from train.data.index import Data, ImageSet, prepare_data
from train.data.loader import Loader, PixelDataset
from train.data.pixel_cache import PixelCache, validation_entries
from train.data.reading import Pixels, read_image
from train.data.sampler import EpochPlan
from train.distributed import Ranks
from train.engine.loop import EpochProgress, train_one_epoch
from train.engine.loss import Criterion
from train.engine.run import TrainingRun
from train.engine.state import TrainState, build_state
from train.models.build import build_model
from train.models.classifier import ImageClassifier
from train.precision import Precision

COLORS = [(200, 40, 40), (40, 60, 200), (40, 190, 60), (210, 200, 50)]
CPU, ONE = torch.device("cpu"), Ranks()
FP32 = Precision("", channels_last=False)


def draw(path: Path, label: int = 0, seed: int = 0, size: tuple[int, int] = (24, 20)) -> Path:
    """One image, mostly of its label's colour; different seeds give different files."""
    rng = np.random.default_rng([label, seed])
    noise = rng.integers(-30, 31, (size[1], size[0], 3))
    pixels = np.clip(np.array(COLORS[label % len(COLORS)]) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def flat_set(root: Path, per_class: int = 6, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    """cat.0.png ... dog.5.png"""
    for label, name in enumerate(names):
        for i in range(per_class):
            draw(root / f"{name}.{i}.png", label, i)
    return root


def settings(tmp_path: Path, **changes: Any) -> TrainConfig:
    """Small and quick, with everything random or averaged off unless asked for."""
    plain: dict[str, Any] = {
        "data": str(tmp_path / "images"),
        "output": str(tmp_path / "runs"),
        "model": "simple_cnn",
        "image_size": 16,
        "batch_size": 4,
        "epochs": 3,
        "precision": "fp32",
        "device": "cpu",
        "num_workers": 0,
        "crop_scale": 1.0,
        "flip": 0.0,
        "color_jitter": 0.0,
        "random_erasing": 0.0,
        "label_smoothing": 0.0,
    }
    return TrainConfig(**(plain | changes))


def make_data(tmp_path: Path, per_class: int = 6, **changes: Any) -> tuple[TrainConfig, Data]:
    config = settings(tmp_path, **changes)
    flat_set(Path(config.data), per_class)
    return config, prepare_data(config)


def image_set(labels: list[int], num_classes: int = 2, sha256: list[str] | None = None) -> ImageSet:
    """Without files."""
    names = tuple(f"class{i}" for i in range(num_classes))
    hashes = sha256 or [f"hash{i}" for i in range(len(labels))]
    paths = [f"{i}.png" for i in range(len(labels))]
    return ImageSet(Path("nowhere"), paths, np.array(labels, np.int64), names, hashes)


def read_pixels(path: Path) -> Pixels:
    return np.asarray(read_image(path))


def pixel_dataset(
    images: ImageSet,
    config: TrainConfig,
    augment: ImageAugment | None = None,
    cache: PixelCache | None = None,
) -> PixelDataset:
    """Images as they are in their files, augmented, or else as they are validated."""
    load = read_pixels if augment else validation_entries(config).load
    return PixelDataset(images, config.seed, augment, load, cache, config.preprocess().size)


class Linear(nn.Module):
    """No batch norm, no dropout: gradients of a batch are sums over its images."""

    def __init__(self, size: int = 16, num_classes: int = 2):
        super().__init__()
        self.layer = nn.Linear(3 * size * size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1))
        return logits


def linear_model(seed: int = 0, num_classes: int = 2) -> ImageClassifier:
    torch.manual_seed(seed)
    return ImageClassifier(Linear(num_classes=num_classes))


def make_state(config: TrainConfig, model: ImageClassifier, steps_per_epoch: int = 3) -> TrainState:
    return build_state(config, model, steps_per_epoch, FP32, ONE, CPU)


def make_run(
    config: TrainConfig,
    data: Data,
    trained: ImageClassifier | TrainState,
    ranks: Ranks = ONE,
    stage: TrainConfig | None = None,
    criterion: Criterion | None = None,
    **more: Any,
) -> TrainingRun:
    """A run on the CPU that decodes its images in this process."""
    plan = EpochPlan(
        len(data.train), config.batch_size, config.seed, ranks.rank, ranks.world_size, config.accumulation
    )
    return TrainingRun(
        config,
        stage or config,
        data,
        ranks,
        CPU,
        plan,
        criterion or Criterion(config.label_smoothing),
        trained if isinstance(trained, TrainState) else make_state(config, trained, plan.steps),
        Loader(pixel_dataset(data.train, config, ImageAugment(stage or config)), 0, pin_memory=False),
        Loader(pixel_dataset(data.val, config), 0, pin_memory=False),
        **more,
    )


def train_epochs(run: TrainingRun, *epochs: int) -> list[dict[str, float]]:
    """Train these epochs, counted from 0, with any history of the run; return their metrics."""
    metrics = []
    for epoch in epochs:
        run.history.epochs_done = epoch
        metrics.append(train_one_epoch(run, EpochProgress(run.ranks, run.device)))
    return metrics


def build(name: str = "simple_cnn", classes: int = 3, size: int = 32, **options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return build_model(name, classes, size, **options)[0]


def pixels(size: int = 32, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator)


def logits(model: ImageClassifier, size: int = 32) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(pixels(size))
    return result

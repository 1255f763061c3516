"""What is noticed of settings and data once both are known, before a run trains."""

import copy
from pathlib import Path

import torch

from train.checkpoint import has_checksum, load_checkpoint
from train.config import TrainConfig
from train.data import Data
from train.loader import EpochPlan
from train.model import ImageClassifier, best_checkpoint

FEW_STEPS = 100


def few_steps(config: TrainConfig, plan: EpochPlan) -> list[str]:
    """A warning of a run too short to learn: the default batch is meant for thousands of images."""
    steps = config.epochs * plan.steps
    if steps >= FEW_STEPS:
        return []
    return [
        f"warning: {steps} optimizer steps in all ({plan.steps} an epoch) are few to learn from: give a "
        "smaller --batch_size or more --epochs"
    ]


def trained_on_validation(config: TrainConfig, data: Data) -> list[str]:
    """Warnings of weights or a teacher from a run that split the same images otherwise."""
    warnings = []
    teacher = str(best_checkpoint(config.teacher)) if config.teacher else ""
    for flag, file in (("--weights", config.weights), ("--teacher", teacher)):
        path = Path(file)
        if not path.is_file() or not has_checksum(path):
            continue
        state = load_checkpoint(path, "meta")
        if state.get("content_digest") == data.content_digest and state["data_digest"] != data.digest:
            other = state["config"]
            warnings.append(
                f"warning: {flag} {getattr(config, flag[2:])} was trained on images that validate here: "
                "validation flatters the model. Give the split of that run: "
                f"--seed {other['seed']} --val_fraction {other['val_fraction']} "
                f"--folds {other['folds']} --fold {other['fold']}"
            )
    return warnings


def check_single_image(model: ImageClassifier, config: TrainConfig) -> None:
    """Batch norm cannot be trained on one image whose last features are one pixel.

    Raises:
        ValueError: so it is.
    """
    size = config.input_size(config.train_size(0))
    try:
        copy.deepcopy(model).cpu().train()(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    except ValueError as error:
        raise ValueError(
            f"{config.model} cannot be trained on single images of {size} pixels ({error}): give each "
            "process two or more by a larger --batch_size, or larger images"
        ) from error

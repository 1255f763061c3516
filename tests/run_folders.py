"""Run directories made without training, by the code that writes those of a real run."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from train.cli import save_config
from train.config import TrainConfig
from train.evaluation.metrics import evaluate_logits
from train.evaluation.predictions import StoredAnswers, finish_predictions


def make_run(
    folder: Path,
    seed: int = 0,
    n: int = 20,
    first: int = 0,
    skill: float = 1.5,
    names: tuple[str, ...] = ("class0", "class1"),
    **settings: Any,
) -> Path:
    """Three epochs, the second one best. Images are first.png, ... ; equal seeds give equal answers.

    An image is as hard in one run as in another, so that runs agree more than by chance.
    """
    folder.mkdir(parents=True)
    numbers = np.arange(first, first + n)
    labels = numbers % len(names)
    shared = np.random.default_rng(123).normal(size=(10_000, len(names)))[numbers]
    logits = shared + np.random.default_rng([seed, 1]).normal(size=(10_000, len(names)))[numbers]
    logits[np.arange(n), labels] += skill
    evaluation = evaluate_logits(logits, labels, names)
    config = TrainConfig(name=folder.name, **{"lr": 1e-3, **settings})
    save_config(config, folder / "config.yaml")
    temperature = evaluation.values["temperature"] if config.calibrate else 1.0
    paths = [f"{i}.png" for i in numbers]
    StoredAnswers(paths, labels, names, logits, temperature, config.clip_probabilities).save(folder)
    finish_predictions(folder)
    best = {f"val/{name}": value for name, value in evaluation.values.items()}
    worse = best | {"val/accuracy": best["val/accuracy"] / 2, "val/log_loss": best["val/log_loss"] * 2}
    worse["val/log_loss_calibrated"] *= 2
    with (folder / "metrics.jsonl").open("w") as file:
        for epoch, values in enumerate((worse, best, worse), 1):
            file.write(json.dumps({"epoch": epoch, "time": 0.0, "train/loss": 1 / epoch, **values}) + "\n")
    return folder

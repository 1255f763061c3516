"""The run directory: runs/NAME/{config.yaml, metrics.jsonl, bad_files.csv, duplicates.csv,
val_predictions.csv, checkpoints/{last,best,epoch-...-step-...}.pt, figures/}."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from serve.contract.errors import UserError
from train.checkpoint import best_checkpoint, load_checkpoint, save_checkpoint
from train.cli import save_config
from train.config import TrainConfig
from train.data.index import Data
from train.evaluation.metrics import Evaluation
from train.evaluation.predictions import read_predictions, write_predictions
from train.models.classifier import ImageClassifier
from train.runs.duplicate_report import list_duplicates, save_duplicates

INFERENCE_KEYS_LEFT_OUT = ("optimizer", "scheduler", "scaler")


def open_folder(config: TrainConfig, data: Data) -> None:
    """Make the run directory with what is known before training, once all settings proved usable.

    Raises:
        UserError: it exists, or cannot be made.
    """
    folder = run_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=bool(config.resume))
    except FileExistsError as error:  # since `prepare` looked
        raise UserError(f"run {str(folder)!r} exists: choose another --name") from error
    except OSError as error:
        raise UserError(f"--output: cannot make {str(folder)!r}: {error.strerror}") from error
    save_config(config.replace(resume=""), folder / "config.yaml")
    write_bad_files(folder, data.bad)
    if not (folder / "duplicates.csv").exists():  # else of this run, and perhaps edited for --exclude
        save_duplicates(folder, list_duplicates(data))


def write_bad_files(folder: Path, bad: dict[str, str]) -> None:
    with open(
        folder / "bad_files.csv", "w", newline="", encoding="utf-8", errors="backslashreplace"
    ) as file:
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(["path", "reason"])
        writer.writerows(bad.items())


def run_folder(config: TrainConfig) -> Path:
    return Path(config.output) / config.name


def save_best(
    folder: Path,
    state: dict[str, Any],
    data: Data,
    evaluation: Evaluation,
    config: TrainConfig,
) -> None:
    """Checkpoint and predictions of an epoch that is the best one.

    The checkpoint has the temperature that its predictions were made with; training goes on without.
    """
    temperature = evaluation.values["temperature"] if config.calibrate else 1.0
    clip = config.clip_probabilities
    write_predictions(folder / "val_predictions.csv", data.val, evaluation, temperature, clip)
    best = {key: value for key, value in state.items() if key not in INFERENCE_KEYS_LEFT_OUT}
    for weights in ("model", "ema"):
        if best[weights] is not None:
            best[weights] = {**best[weights], "temperature": torch.tensor(temperature)}
    save_checkpoint(best, best_checkpoint(folder))


def draw_subject_crops(folder: Path, model: ImageClassifier, data: Data, config: TrainConfig) -> None:
    """What the best epoch's weights, which `model` is given, cut out of validation images."""
    from train.evaluation.figures import save_subject_crops

    best = load_checkpoint(best_checkpoint(folder))
    model.load_state_dict(best["ema"] or best["model"])
    assert model.subject is not None
    model.subject.active = best["crops_subject"]
    path = folder / "figures" / "subject_crops.png"
    save_subject_crops(path, model, data.val, config.preprocess())


def report_files(
    folder: Path, rows: Sequence[dict[str, Any]], data: Data, config: TrainConfig
) -> list[Path]:
    """Draw the figures of the finished run; returns what belongs in MLflow."""
    from train.evaluation.figures import save_figures  # half a second, which the start need not spend

    predictions = read_predictions(folder / "val_predictions.csv")
    assert predictions.paths == list(data.val.paths), f"{predictions.source} is of other images"
    save_figures(folder / "figures", rows, predictions, data.val, config.preprocess())
    names = ["config.yaml", "metrics.jsonl", "bad_files.csv", "val_predictions.csv", "figures"]
    if (folder / "duplicates.csv").exists():
        names.append("duplicates.csv")
    return [*(folder / name for name in names), best_checkpoint(folder)]

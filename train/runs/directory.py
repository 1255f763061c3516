"""Run directories: runs/NAME/{config.yaml, status.json, metrics.jsonl, bad_files.csv, duplicates.csv,
val_predictions.{npz,csv}, checkpoints/{last,best,epoch-...-step-...}.pt, figures/, report.html}."""

import json
from pathlib import Path
from typing import Any

import torch

from serve.contract.errors import UserError
from serve.contract.files import atomic_write
from train.checkpoint import best_checkpoint, save_checkpoint
from train.cli import save_config
from train.config import TrainConfig
from train.data.index import Data
from train.evaluation.metrics import Evaluation
from train.evaluation.predictions import StoredAnswers
from train.evaluation.tables import write_table
from train.runs.duplicate_report import list_duplicates, save_duplicates

TRAINING_KEYS = ("optimizer", "scheduler", "scaler")  # of a checkpoint, which inference needs not
STATUS = "status.json"


def create_run_folder(config: TrainConfig, data: Data) -> None:
    """Make the run directory with what is known before training; call it once all settings proved usable.
    Raises UserError if it exists and is not resumed, or cannot be made."""
    folder = run_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=bool(config.resume))
    except FileExistsError as error:  # made since the run was chosen
        raise UserError(f"run {str(folder)!r} exists: choose another --name") from error
    except OSError as error:
        raise UserError(f"--output: the folder {str(folder)!r} cannot be made: {error.strerror}") from error
    save_config(config.replace(resume=""), folder / "config.yaml")
    write_bad_files(folder, data.bad)
    if not (folder / "duplicates.csv").exists():  # a resumed run's may have been edited for --exclude
        save_duplicates(folder, list_duplicates(data))


def write_bad_files(folder: Path, bad: dict[str, str]) -> None:
    columns = ("path", "reason")
    rows = [dict(zip(columns, item, strict=True)) for item in bad.items()]
    write_table(folder / "bad_files.csv", rows, columns)


def write_status(folder: Path, status: str) -> None:
    """Write RUNNING, or how the last training ended (MLflow's words): FINISHED, KILLED or FAILED."""
    with atomic_write(folder / STATUS) as file:
        file.write(json.dumps({"status": status}).encode())


def read_status(folder: Path) -> str:
    """Return the status of a run; "" if there is none, or none that can be read."""
    try:
        return str(json.loads((folder / STATUS).read_text(encoding="utf-8"))["status"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ""


def run_folder(config: TrainConfig) -> Path:
    return Path(config.output) / config.name


def save_best(
    folder: Path, state: dict[str, Any], data: Data, evaluation: Evaluation, config: TrainConfig
) -> None:
    """Write the predictions, as arrays, and the checkpoint of the best epoch.

    The checkpoint has the temperature that its predictions were made with; training continues without.
    """
    temperature = evaluation.values["temperature"] if config.calibrate else 1.0
    StoredAnswers(
        list(data.val.paths),
        evaluation.labels,
        data.val.class_names,
        evaluation.logits,
        temperature,
        config.clip_probabilities,
    ).save(folder)
    best = {key: value for key, value in state.items() if key not in TRAINING_KEYS}
    for weights in ("model", "ema"):
        if best[weights] is not None:
            best[weights] = {**best[weights], "temperature": torch.tensor(temperature)}
    save_checkpoint(best, best_checkpoint(folder))

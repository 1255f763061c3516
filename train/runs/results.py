"""What a run left behind, read back strictly: val_predictions.csv, metrics.jsonl, config.yaml.

A file that is missing, damaged or of another run is a UserError that names it.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from serve.contract.errors import UserError
from train.config import TrainConfig
from train.data.label_file import SOFT_COLUMN
from train.evaluation.calibration import log_probabilities
from train.evaluation.significance import PairedTest, paired_test
from train.runs.history import History

COLUMNS = ("path", "label", "prediction", "correct", "loss")
LOSS_TOLERANCE = 1e-5  # the table's numbers are rounded
SMALLEST_PROBABILITY = 1e-40  # below, the table's numbers are not exact


@dataclass(frozen=True)
class Predictions:
    """Of one checkpoint on its validation images; arrays are [N], N > 0."""

    source: str
    """File, for messages."""
    paths: list[str]
    labels: list[str]
    correct: NDArray[np.bool_]
    losses: NDArray[np.float64]
    """Cross-entropy of each image, as the exported model has it: calibrated and clipped as set."""
    probabilities: NDArray[np.float64]
    """[N, num_classes]"""
    class_names: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


@dataclass(frozen=True)
class RunResult:
    name: str
    folder: Path
    config: dict[str, Any]
    """As in config.yaml, which another version may have written."""
    rows: list[dict[str, Any]]
    """Those of metrics.jsonl."""
    best_epoch: int
    predictions: Predictions
    """Of the best epoch."""

    @property
    def best(self) -> dict[str, Any]:
        return self.rows[self.best_epoch - 1]


def read_run(folder: Path, name: str = "") -> RunResult:
    """A run directory; `name` is how reports call it, by default the folder's own name."""
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a run directory: there is no such folder")
    config = _read_config(folder / "config.yaml")
    calibrate = bool(config.get("calibrate", False))  # runs of before there was such a setting did not
    rows = _read_rows(folder / "metrics.jsonl", calibrate)
    predictions = read_predictions(folder / "val_predictions.csv")
    history = History()
    for row in rows:
        history.update(row, TrainConfig(best_by=config.get("best_by", "accuracy"), calibrate=calibrate))
    result = RunResult(name or folder.resolve().name, folder, config, rows, history.best_epoch, predictions)
    check_metrics(
        predictions,
        result.best,
        float(result.best["val/temperature"]) if calibrate else 1.0,
        float(config.get("clip_probabilities", 0.0)),
        f"{folder / 'metrics.jsonl'}, epoch {result.best_epoch},",
    )
    return result


def check_metrics(
    predictions: Predictions, metrics: dict[str, Any], temperature: float, clip: float, source: str
) -> None:
    """The table and the recorded metrics must tell of one checkpoint.

    Recorded is the log loss before `temperature` and `clip`, the table has both. With a clip accuracy alone
    is compared: earlier versions clipped in a way that cannot be undone.

    Raises:
        UserError: they differ by more than rounding.
    """
    checks = [("val/accuracy", predictions.accuracy, 1e-9)]
    if not clip and not (predictions.probabilities < SMALLEST_PROBABILITY).any():
        classes = {name: i for i, name in enumerate(predictions.class_names)}
        labels = [classes[label] for label in predictions.labels]
        uncalibrated = log_probabilities(temperature * np.log(predictions.probabilities))
        log_loss = float(-uncalibrated[np.arange(len(labels)), labels].mean())
        checks.append(("val/log_loss", log_loss, LOSS_TOLERANCE * max(1.0, temperature)))
    for name, value, tolerance in checks:
        recorded = float(metrics[name])
        if not np.isclose(value, recorded, rtol=0, atol=tolerance, equal_nan=True):
            raise UserError(
                f"{predictions.source} gives {name} {value:.6f}, but {source} says {recorded:.6f}: they "
                "are not of one checkpoint (a run that was killed while saving is whole after --resume)"
            )


def paired(run: Predictions, reference: Predictions) -> PairedTest | None:
    """Test on the images that both have, joined by path; None when there is no such image.

    Raises:
        UserError: a path has two labels, so it does not name the same image in both.
    """
    places = {path: i for i, path in enumerate(reference.paths)}
    here = [i for i, path in enumerate(run.paths) if path in places]
    there = [places[run.paths[i]] for i in here]
    for i, j in zip(here, there, strict=True):
        if run.labels[i] != reference.labels[j]:
            raise UserError(
                f"{run.source} and {reference.source} are not of the same images: {run.paths[i]!r} is "
                f"labelled {run.labels[i]!r} in one and {reference.labels[j]!r} in the other"
            )
    if not here:
        return None
    return paired_test(
        run.correct[here], reference.correct[there], run.losses[here], reference.losses[there]
    )


def read_predictions(path: Path) -> Predictions:
    """What train/evaluation/metrics.py wrote, without the images."""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.reader(file, strict=True)
            header = next(table, [])
            rows = list(table)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except csv.Error as error:
        raise UserError(f"{path} is damaged: {error}") from error
    names = tuple(column.removeprefix(SOFT_COLUMN) for column in header[len(COLUMNS) :])
    if tuple(header) != (*COLUMNS, *(SOFT_COLUMN + name for name in names)) or len(names) < 2:
        raise UserError(f"{path} is not a table of predictions: its columns are {header}")
    if not rows:
        raise UserError(f"{path} is damaged: it has no rows")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise UserError(f"{path} is damaged: row {number} has {len(row)} of {len(header)} values")
    paths, labels, predicted, correct = list(zip(*rows, strict=True))[: COLUMNS.index("loss")]
    if len(set(paths)) < len(paths):
        raise UserError(f"{path} is damaged: an image occurs twice")
    right = np.array([a == b for a, b in zip(labels, predicted, strict=True)])
    try:
        numbers = np.array([row[COLUMNS.index("loss") :] for row in rows], np.float64)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not set(labels) <= set(names):
        raise UserError(f"{path} is damaged: {sorted(set(labels) - set(names))} are no classes of it")
    if [str(int(r)) for r in right] != list(correct):
        raise UserError(f"{path} is damaged: the column 'correct' contradicts label and prediction")
    return Predictions(str(path), list(paths), list(labels), right, numbers[:, 0], numbers[:, 1:], names)


def _read_rows(path: Path, calibrate: bool) -> list[dict[str, Any]]:
    """Epochs 1, 2, ..., some of them without a validation; a last line that a crash cut off is not there
    yet."""
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    names = ["val/accuracy", "val/log_loss"]
    names += ["val/temperature", "val/log_loss_calibrated"] if calibrate else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            whole = row["epoch"] == number
            validated = any(name.startswith("val/") for name in row)
            row |= {name: float(row[name]) for name in ("train/loss", *(names if validated else ()))}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: line {number} is no epoch's metrics") from error
        if not whole:
            raise UserError(f"{path} is damaged: line {number} is of epoch {row['epoch']}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no whole epoch{': its only line is cut off' if rest else ''}")
    return rows


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("best_by", "accuracy") not in ("accuracy", "log_loss"):
        raise UserError(f"{path} is damaged: it does not hold a run's settings")
    return config

"""Finished runs, read back strictly from val_predictions.npz, metrics.jsonl and config.yaml.

A file that is missing, damaged or of another run is a UserError that names it.
"""

from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from serve.contract.errors import UserError
from train.cli import parse_unchecked
from train.config import TrainConfig
from train.evaluation.calibration import log_confidences
from train.evaluation.predictions import ARRAYS, Predictions, StoredAnswers
from train.evaluation.significance import Interval, PairedTest, paired_test, roc_auc_interval
from train.runs.history import History
from train.tracking.base import read_metrics

MOST_AUC_CLASSES = 100  # whose ROC AUC gets an interval: 50,000 images take some 10 ms for each class
LOSS_TOLERANCE = 1e-6  # of another machine's arithmetic


@dataclass(frozen=True)
class RunResult:
    name: str
    folder: Path
    config: TrainConfig
    rows: list[dict[str, Any]]
    """Those of metrics.jsonl."""
    best_epoch: int
    predictions: Predictions
    """Of the best epoch."""

    @property
    def best(self) -> dict[str, Any]:
        return next(row for row in self.rows if row["epoch"] == self.best_epoch)

    @property
    def roc_auc(self) -> Interval | None:
        """None where a class has no image; without an interval of many classes, which would take long."""
        if "val/roc_auc" not in self.best:
            return None
        if len(self.predictions.class_names) > MOST_AUC_CLASSES:
            return Interval(float(self.best["val/roc_auc"]), nan, nan)
        return roc_auc_interval(self.predictions.labels, self.predictions.probabilities)


def read_run(folder: Path, name: str = "") -> RunResult:
    """Read a run directory; reports call it `name`, by default the folder's own name."""
    if not (folder / "config.yaml").exists():
        lack = "no config.yaml in it" if folder.is_dir() else "no such folder"
        raise UserError(f"{str(folder)!r} is not a run directory: there is {lack}")
    config = _read_config(folder / "config.yaml")
    rows = _read_rows(folder / "metrics.jsonl", config.calibrate)
    answers = StoredAnswers.load(folder)
    predictions = answers.predictions(str(folder / ARRAYS))
    history = History()
    for row in rows:
        history.update(row, config)
    result = RunResult(name or folder.resolve().name, folder, config, rows, history.best_epoch, predictions)
    source = f"{folder / 'metrics.jsonl'}, epoch {result.best_epoch},"
    check_metrics(answers, predictions.source, result.best, source)
    return result


def check_metrics(answers: StoredAnswers, name: str, metrics: dict[str, Any], source: str) -> None:
    """Raise UserError if answers, called `name`, and the metrics that `source` records differ by more than
    rounding: they are of two checkpoints."""
    own, _ = log_confidences(answers.logits, answers.labels)
    correct = answers.logits.argmax(axis=1) == answers.labels
    for metric, value in (("val/accuracy", correct.mean()), ("val/log_loss", -own.mean())):
        recorded = float(metrics[metric])
        if not np.isclose(value, recorded, rtol=0, atol=LOSS_TOLERANCE, equal_nan=True):
            raise UserError(
                f"{name} gives {metric} {value:.6f}, but {source} records {recorded:.6f}: they are of two "
                "checkpoints. If the run was killed while saving, --resume mends it"
            )


def paired(run: Predictions, reference: Predictions) -> PairedTest | None:
    """Test on the images that both have, joined by path; None when they share none. Raises UserError if a
    path has two labels, so that it does not name the same image in both."""
    positions = {path: i for i, path in enumerate(reference.paths)}
    pairs = [(i, positions[path]) for i, path in enumerate(run.paths) if path in positions]
    for i, j in pairs:
        ours, theirs = run.class_names[run.labels[i]], reference.class_names[reference.labels[j]]
        if ours != theirs:
            raise UserError(
                f"{run.source} and {reference.source} are of different images: {run.paths[i]!r} has the "
                f"label {ours!r} in the first and {theirs!r} in the second; if it was corrected, evaluate "
                "both models on the corrected labels with pipelines/evaluate.py"
            )
    if not pairs:
        return None
    ours, theirs = np.array(pairs).T
    return paired_test(
        run.correct[ours], reference.correct[theirs], run.losses[ours], reference.losses[theirs]
    )


def _read_rows(path: Path, calibrate: bool) -> list[dict[str, Any]]:
    """Return epochs 1, 2, ..., some without a validation. A last line that a crash cut off is left out."""
    rows = read_metrics(path)
    served = ("val/temperature", "val/log_loss_calibrated") if calibrate else ()
    for epoch, row in enumerate(rows, 1):
        validated = any(name.startswith("val/") for name in row)
        names = ("train/loss", *(("val/accuracy", "val/log_loss", *served) if validated else ()))
        lacks = [name for name in names if not isinstance(row.get(name), float | int)]
        if lacks or row.get("epoch") != epoch:
            wrong = f"lacks {', '.join(lacks)}" if lacks else f"has epoch {row.get('epoch')}"
            raise UserError(f"{path} is damaged: epoch {epoch} {wrong}")
    if not rows:
        raise UserError(f"{path} has no whole epoch: resume the run with --resume")
    return rows


def _read_config(path: Path) -> TrainConfig:
    try:
        return parse_unchecked(["--config", str(path)])
    except UserError as error:
        raise UserError(f"{path} is damaged, or of another version: {error}") from error

"""Cross-validation: a run for each fold, their predictions joined, and one run in MLflow above them."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.launch import run_program
from serve.contract.errors import UserError
from serve.contract.mlflow_tags import CROSS_VALIDATION
from train.checkpoint import best_checkpoint, last_checkpoint, load_checkpoint
from train.cli import given_values, parse_config
from train.config import TrainConfig
from train.evaluation.predictions import Predictions, read_predictions
from train.settings import refuse_given
from train.tracking.run_record import FILE, child_environment, read_record

ACCURACY = "best/val/accuracy"  # as trainings have it: of all images, each by the run that did not see it


@dataclass(frozen=True)
class OutOfFold:
    """Predictions of each image by the run that did not train on it; arrays are [N]."""

    root: Path
    paths: list[str]
    """Relative to root, or absolute."""
    labels: NDArray[np.int64]
    """Given labels as indices of class_names."""
    probabilities: NDArray[np.float64]
    """[N, num_classes]"""
    folds: NDArray[np.int64]
    """Numbers of the folds, from 1."""
    class_names: tuple[str, ...]
    num_folds: int

    @property
    def missing(self) -> list[int]:
        """Folds without a run."""
        return sorted(set(range(1, self.num_folds + 1)) - set(self.folds.tolist()))

    @property
    def accuracy(self) -> float:
        return float((self.probabilities.argmax(axis=1) == self.labels).mean())


def read_folds(runs: Sequence[Path]) -> OutOfFold:
    """Join the predictions of runs.

    Raises:
        UserError: these are no folds of one data set, or an image is in two; the message names them.
    """
    parts = [_read_fold(run) for run in runs]
    first, reference = runs[0], parts[0][1]
    run_of_fold: dict[int, Path] = {}
    run_of_image: dict[str, Path] = {}
    for run, (predictions, state) in zip(runs, parts, strict=True):
        for name, own, other in (
            ("--folds", state["config"]["folds"], reference["config"]["folds"]),
            ("--seed", state["config"]["seed"], reference["config"]["seed"]),
            ("data (digest)", state["content_digest"][:12], reference["content_digest"][:12]),
            ("class names", state["class_names"], reference["class_names"]),
        ):
            if own != other:
                raise UserError(
                    f"{run} and {first} are not folds of one data set: {name} {own!r} and {other!r}"
                )
        fold = state["config"]["fold"]
        if fold in run_of_fold:
            raise UserError(f"{run_of_fold[fold]} and {run} are both fold {fold}")
        run_of_fold[fold] = run
        for path in predictions.paths:
            if path in run_of_image:
                raise UserError(f"{path!r} is in both {run_of_image[path]} and {run}: they are no folds")
            run_of_image[path] = run
    tables = [predictions for predictions, _ in parts]
    sizes = [len(table.paths) for table in tables]
    return OutOfFold(
        Path(reference["val_root"]),
        [path for table in tables for path in table.paths],
        np.concatenate([table.labels for table in tables]),
        np.concatenate([table.probabilities for table in tables]),
        np.repeat([state["config"]["fold"] for _, state in parts], sizes),
        tables[0].class_names,
        reference["config"]["folds"],
    )


def _read_fold(run: Path) -> tuple[Predictions, dict[str, Any]]:
    state = load_checkpoint(best_checkpoint(run))
    if not state["config"].get("folds"):
        raise UserError(f"{run} is no fold: it was trained without --folds")
    predictions = read_predictions(run)
    if predictions.class_names != tuple(state["class_names"]):
        raise UserError(f"{predictions.source} is not of {best_checkpoint(run)}: other classes")
    return predictions, state


def train_folds(folds: int, output: Path, flags: Sequence[str], processes: int) -> OutOfFold:
    """Train, or resume, a run for each fold, and return their predictions.

    train/main.py leaves a finished run as it is, and refuses other settings or data than the run's.
    """
    runs = [output / f"fold{fold}of{folds}" for fold in range(1, folds + 1)]
    owns = [
        ["--folds", str(folds), "--fold", str(fold), "--output", str(output), "--name", folder.name]
        for fold, folder in enumerate(runs, 1)
    ]
    config = parse_config(flags)
    for own in owns:
        refuse_given(config, given_values(own), "pipelines/label_issues.py")
        parse_config([*flags, *own])
    parent = ParentOfFolds(config, output.resolve().name, runs)
    try:
        for folder, own in zip(runs, owns, strict=True):
            if last_checkpoint(folder).exists():
                own = ["--resume", str(folder)]  # without an epoch done, train/main.py finds it by its name
            run_program("train/main.py", *flags, *own, processes=processes, environment=parent.environment)
        data = read_folds(runs)
    except BaseException as error:
        parent.end("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    parent.end("FINISHED", data.accuracy)
    return data


class ParentOfFolds:
    """The run in MLflow above the folds; its folds keep it when they are resumed. Without MLflow it costs a
    warning."""

    def __init__(self, config: TrainConfig, name: str, runs: Sequence[Path]):
        records = [record for run in runs if (record := read_record(run / FILE))]
        known = next((record.tags.get("mlflow.parentRunId", "") for record in records), "")
        self.run_id = ""
        if config.track and (known or not records):  # folds that ran without keep their place
            from train.tracking.parent_run import open_parent  # a second that others save

            try:
                given = {"folds": str(len(runs)), "model": config.model, "seed": str(config.seed)}
                self.run_id = open_parent(config.experiment, name, known, given, CROSS_VALIDATION)
            except (UserError, ConnectionError) as error:
                self._warn(error)
        self.environment = os.environ | child_environment(self.run_id, {}) if self.run_id else None

    def end(self, status: str, accuracy: float | None = None) -> None:
        if not self.run_id:
            return
        from train.tracking.parent_run import log_parent

        points = [] if accuracy is None else [(ACCURACY, accuracy, 0, int(1000 * time.time()))]
        try:
            log_parent(self.run_id, points, {}, status=status)
        except (UserError, ConnectionError) as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        print(f"warning: the run above the folds in MLflow is not up to date: {error}", flush=True)

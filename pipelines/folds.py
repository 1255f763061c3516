"""Trainings of a cross-validation: a run for each fold, below one run in MLflow that has their accuracy."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from pipelines.launch import run_program
from pipelines.out_of_fold import OutOfFold, read_folds
from serve.contract.errors import UserError
from serve.contract.mlflow_tags import CROSS_VALIDATION
from train.checkpoint import last_checkpoint
from train.cli import given_values, parse_config
from train.config import TrainConfig
from train.settings import refuse_given
from train.tracking.run_record import FILE, child_environment, read_record

ACCURACY = "best/val/accuracy"  # as trainings have it: of all images, each by the run that did not see it


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

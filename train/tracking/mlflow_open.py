"""Open the MLflow run of a training run: a new one, its own again, or the one that MLFLOW_RUN_ID names."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.tracking.client import DEFAULT_EXPERIMENT, NO_SUCH_RUN, connect, mlflow, use_experiment
from train.tracking.mlflow_errors import RefusedError
from train.tracking.run_record import Record

KEY_TAG = "purebred.key"
OF_THE_CALL = ("resume", "output", "name")  # what a run is resumed by, not what it is
RESUMED = re.compile(r"resume\.(\d+)(?:-(\d+))?\.(.+)")


def open_run(record: Record, path: Path, system_metrics_seconds: int) -> bool:
    """Make the run active in this thread, and keep in the record at `path` what finds it again.

    Returns whether MLflow had the run before. With 0 seconds no system metrics are logged.

    Raises:
        RefusedError: the run is deleted or not there, or MLFLOW_RUN_ID names one that does not suit.
        Exception: whatever mlflow, requests and SQLAlchemy raise.
    """
    uri = connect(record.uri, record.run_id)
    if not record.run_id and record.uri != uri:
        record.uri = uri
        save(record, path)  # also when the store does not answer now
    if not record.run_id and not record.asked:
        record.run_id = _given_run(record, uri)
    if record.run_id:
        use_experiment("", _own_experiment(record.run_id, uri, record.uri))
    else:
        experiment = use_experiment(record.experiment, record.experiment_id)
        if record.asked:
            asked_for = f"tags.`{KEY_TAG}` = '{record.key}'"
            found = mlflow.MlflowClient().search_runs([experiment], asked_for, max_results=1)
            record.run_id = found[0].info.run_id if found else ""
    which: dict[str, Any] = {"run_id": record.run_id} if record.run_id else {"run_name": record.name}
    if not record.run_id:
        record.asked, record.dataset_logged = True, False
        save(record, path)
        os.environ.pop("MLFLOW_RUN_ID", None)  # mlflow.start_run would take it, whatever its state
    tags = {**record.tags, KEY_TAG: record.key}  # also of a resumed run, as another trial
    if system_metrics_seconds:
        mlflow.set_system_metrics_sampling_interval(system_metrics_seconds)
    opened = mlflow.start_run(**which, tags=tags, log_system_metrics=bool(system_metrics_seconds))
    had, record.run_id, record.uri = bool(record.run_id), opened.info.run_id, uri
    save(record, path)
    return had


def save(record: Record, path: Path) -> None:
    """A full disk, of which metrics.jsonl's own warning speaks, stops nothing."""
    with suppress(OSError):
        record.save(path)


def _own_experiment(run_id: str, uri: str, recorded: str) -> str:
    run = _find(run_id)
    if run is None:
        elsewhere = f"to {recorded}, where it was logged" if recorded not in ("", uri) else "to its store"
        raise RefusedError(
            f"run {run_id} is not in {uri}: set MLFLOW_TRACKING_URI {elsewhere}; if it was deleted for "
            'good, make "run_id" in tracking.json "", and a new run is made'
        )
    experiment = mlflow.get_experiment(run.info.experiment_id)
    if experiment.lifecycle_stage == "deleted":
        raise RefusedError(
            f"experiment {experiment.name!r} in {uri} is deleted: mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id} brings it back"
        )
    if run.info.lifecycle_stage == "deleted":
        raise RefusedError(
            f"run {run_id} in {uri} is deleted: mlflow runs restore --run-id {run_id} brings it back"
        )
    return str(experiment.experiment_id)


def _given_run(record: Record, uri: str) -> str:
    """The run that MLFLOW_RUN_ID names, as MLflow Projects do; "" if none is named."""
    run_id = os.environ.get("MLFLOW_RUN_ID", "")
    if not run_id:
        return ""
    run, wrong = _find(run_id), ""
    asked = record.experiment_id or record.experiment
    if run is None:
        wrong = f"is not in {uri}"
    elif run.info.lifecycle_stage == "deleted":
        wrong = "is deleted"
    elif run.info.status not in ("RUNNING", "SCHEDULED"):
        wrong = f"has ended ({run.info.status})"
    elif run.data.tags.get(KEY_TAG, record.key) != record.key:
        wrong = "holds another training run"
    else:
        experiment = mlflow.get_experiment(run.info.experiment_id)
        if asked not in (DEFAULT_EXPERIMENT, experiment.name, experiment.experiment_id):
            wrong = f"is of experiment {experiment.name!r}, not {asked!r}"
    if wrong:
        raise RefusedError(
            f"run {run_id}, which MLFLOW_RUN_ID names, {wrong}: unset MLFLOW_RUN_ID, and a run is made, or "
            "set it to one that is running and empty"
        )
    return run_id


def _find(run_id: str) -> Any:
    """None: there is no such run, or it is no ID."""
    try:
        return mlflow.get_run(run_id)
    except mlflow.MlflowException as error:
        if error.error_code in NO_SUCH_RUN:
            return None
        raise


def changes(known: Mapping[str, str], values: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Parameters that are not what MLflow has of them, as last changed: name -> (old, new)."""
    last = dict(known)
    resumed = [(found, value) for key, value in known.items() if (found := RESUMED.fullmatch(key))]
    for found, value in sorted(resumed, key=lambda item: (int(item[0][1]), int(item[0][2] or 1))):
        last[found[3]] = value
    return {
        key: (last[key], value)
        for key, value in values.items()
        if last.get(key, value) != value and key not in OF_THE_CALL
    }


def free_name(known: Mapping[str, str], epoch: int, name: str) -> str:
    """MLflow keeps a parameter's first value: resume.6.epochs, or resume.6-2.epochs if that is taken."""
    key, number = f"resume.{epoch}.{name}", 1
    while key in known:
        number += 1
        key = f"resume.{epoch}-{number}.{name}"
    return key

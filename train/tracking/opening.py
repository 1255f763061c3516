"""Open the MLflow run of a training run: a new one, its own again, or the one that MLFLOW_RUN_ID names."""

import os
from pathlib import Path
from typing import Any

from train.tracking.client import DEFAULT_EXPERIMENT, TrackingStore, mlflow
from train.tracking.contents import KEY_TAG
from train.tracking.errors import RefusedError
from train.tracking.run_record import Record


def open_mlflow_run(store: TrackingStore, record: Record, path: Path) -> tuple[Any, bool]:
    """Return MLflow's run, and whether MLflow had it before; the record at `path` gets what finds it again.
    Raises RefusedError if the run is deleted or not there, or MLFLOW_RUN_ID names one that does not suit,
    and what mlflow, requests and SQLAlchemy raise."""
    client = store.client
    if not record.run_id and record.uri != store.uri:
        record.uri = store.uri
        record.save(path)  # also if a request below fails
    if not record.run_id and not record.requested:
        record.run_id = _given_run(store, record)
    if record.run_id:
        _check_own_run(store, record)
    else:
        experiment = store.experiment_id(record.experiment, record.experiment_id)
        if record.requested:
            by_key = f"tags.`{KEY_TAG}` = '{record.key}'"
            found = client.search_runs([experiment], by_key, max_results=1)
            record.run_id = found[0].info.run_id if found else ""
    tags, had = {**record.tags, KEY_TAG: record.key}, bool(record.run_id)
    if had:
        client.update_run(record.run_id, status="RUNNING")
        client.log_batch(record.run_id, tags=[mlflow.entities.RunTag(*tag) for tag in tags.items()])
    else:
        record.requested, record.dataset_logged = True, False
        record.save(path)
        # those of the user, the command and the commit come from MLflow
        tags = mlflow.tracking.context.registry.resolve_tags(tags)
        run = client.create_run(experiment, record.started, tags, record.name)
        record.run_id = run.info.run_id
    record.uri = store.uri
    record.save(path)
    return client.get_run(record.run_id), had


def _check_own_run(store: TrackingStore, record: Record) -> None:
    run_id, run = record.run_id, store.find_run(record.run_id)
    if run is None:
        known = f"{record.uri}, where it was logged" if record.uri not in ("", store.uri) else "its store"
        raise RefusedError(
            f"run {run_id} is not in {store.uri}: set MLFLOW_TRACKING_URI to {known}; to have a new run "
            'there, as when it was deleted for good, set "run_id" in tracking.json to ""'
        )
    store.experiment_id("", run.info.experiment_id)
    if run.info.lifecycle_stage == "deleted":
        raise RefusedError(
            f"run {run_id} in {store.uri} is deleted: mlflow runs restore --run-id {run_id} brings it back"
        )


def _given_run(store: TrackingStore, record: Record) -> str:
    """Return the run that MLFLOW_RUN_ID names, as MLflow Projects do; "" if none is named."""
    run_id = os.environ.get("MLFLOW_RUN_ID", "")
    if not run_id:
        return ""
    run, wrong = store.find_run(run_id), ""
    wanted = record.experiment_id or record.experiment
    if run is None:
        wrong = f"is not in {store.uri}"
    elif run.info.lifecycle_stage == "deleted":
        wrong = "is deleted"
    elif run.info.status not in ("RUNNING", "SCHEDULED"):
        wrong = f"has ended ({run.info.status})"
    elif run.data.tags.get(KEY_TAG, record.key) != record.key:
        wrong = "holds another training run"
    else:
        experiment = store.client.get_experiment(run.info.experiment_id)
        if wanted not in (DEFAULT_EXPERIMENT, experiment.name, experiment.experiment_id):
            wrong = f"is of experiment {experiment.name!r}, not {wanted!r}"
    if wrong:
        raise RefusedError(
            f"run {run_id}, which MLFLOW_RUN_ID names, {wrong}: unset MLFLOW_RUN_ID to make a new run, or "
            "set it to one that is running and empty"
        )
    return run_id

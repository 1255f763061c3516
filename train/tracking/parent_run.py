"""A run in MLflow above others: a sweep's above its trials, a cross-validation's above its folds."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from serve.contract.mlflow_tags import KIND_TAG, SWEEP
from train.tracking.client import TrackingStore, choose_experiment, mlflow

Metric, Param, RunTag = mlflow.entities.Metric, mlflow.entities.Param, mlflow.entities.RunTag


def open_parent(
    experiment: str, name: str, run_id: str, parameters: dict[str, str], kind: str = SWEEP
) -> str:
    """Start the run, or resume it (`run_id`); returns its ID."""
    store = TrackingStore()
    with store.errors():
        if run_id:
            store.client.update_run(run_id, status="RUNNING")
            return run_id
        experiment_id = store.experiment_id(*choose_experiment(experiment))
        run_id = store.client.create_run(
            experiment_id,
            tags=mlflow.tracking.context.registry.resolve_tags({KIND_TAG: kind}),
            run_name=name,
        ).info.run_id
        params = [Param(key, value) for key, value in parameters.items()]
        try:
            refused = store.send_each(params, lambda some: store.client.log_batch(run_id, params=some))
        except BaseException:
            with suppress(Exception):  # the next call makes another run
                store.client.set_terminated(run_id, "FAILED")
            raise
    for key, error in refused:
        print(f"warning: the run {name} in MLflow is without its parameter {key}: {error}", flush=True)
    return str(run_id)


def end_children(parent: str) -> None:
    """Set runs of lost processes, which MLflow shows as RUNNING, to KILLED; no trial may be running."""
    store = TrackingStore()
    with store.errors():
        experiment = store.client.get_run(parent).info.experiment_id
        lost = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
        for run in store.client.search_runs([experiment], lost):
            store.client.set_terminated(run.info.run_id, "KILLED")


def log_parent(
    run_id: str,
    points: Sequence[tuple[str, float, int, int]],
    tags: dict[str, str],
    files: Sequence[Path] = (),
    status: str = "",
) -> None:
    """Log to such a run, and end it if there is a `status`.

    `points` are (metric, value, step, milliseconds since 1970); a point that is logged twice is one.
    """
    store = TrackingStore()
    with store.errors():
        metrics = [Metric(name, value, milliseconds, step) for name, value, step, milliseconds in points]
        store.client.log_batch(run_id, metrics)
        store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        for file in files:
            store.client.log_artifact(run_id, str(file))
        if status:
            store.client.set_terminated(run_id, status)

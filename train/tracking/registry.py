"""What promotion and sweeps ask of MLflow. Unlike a training run they need its answers."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from serve.contract.errors import UserError
from serve.contract.metadata import ModelMetadata
from train.tracking.client import choose_experiment, connect, log_points, mlflow, store_uri, use_experiment
from train.tracking.mlflow_errors import explain, may_pass, without_passwords

Metric, Param, RunTag = mlflow.entities.Metric, mlflow.entities.Param, mlflow.entities.RunTag


@contextmanager
def mlflow_answers() -> Iterator[None]:
    """Turn mlflow's, requests' and SQLAlchemy's exceptions into a UserError that names the server."""
    connect()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # they share no base
        reason = explain(error, store_uri())
        if may_pass(error):
            reason = f"it does not answer: {(str(error) or type(error).__name__).splitlines()[0]}"
        uri = mlflow.get_tracking_uri()
        raise UserError(without_passwords(f"MLflow at {uri}: {reason}")) from error


@dataclass(frozen=True)
class ModelVersion:
    version: str
    run_id: str
    metadata: ModelMetadata
    """What the registered ONNX file says of itself."""


def read_aliases(model: str) -> dict[str, str]:
    """Alias -> version of a registered model."""
    with mlflow_answers():
        aliases = mlflow.MlflowClient().get_registered_model(model).aliases
    return {alias: str(version) for alias, version in aliases.items()}  # some stores give numbers


def read_version(model: str, version: str) -> ModelVersion:
    with mlflow_answers():
        run_id = mlflow.MlflowClient().get_model_version(model, version).run_id
        proto = mlflow.onnx.load_model(f"models:/{model}/{version}")
        metadata = ModelMetadata.from_props({prop.key: prop.value for prop in proto.metadata_props})
    return ModelVersion(version, run_id, metadata)


def move_alias(model: str, alias: str, version: str, seen: dict[str, str]) -> None:
    """Give the alias to this version if all aliases still are what `seen` says.

    MLflow has no compare-and-set: this look just before narrows the race to milliseconds, in which the
    later of two wins.
    """
    aliases = read_aliases(model)
    if aliases != seen:
        raise UserError(f"the aliases of {model} changed meanwhile, from {seen} to {aliases}: run it again")
    with mlflow_answers():
        mlflow.MlflowClient().set_registered_model_alias(model, alias, version)


def fetch_run_file(run_id: str, name: str, folder: Path) -> Path:
    """Download a file that the run logged."""
    with mlflow_answers():
        path = mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path=name, dst_path=str(folder), tracking_uri=mlflow.get_tracking_uri()
        )
    return Path(path)


def open_parent(experiment: str, name: str, run_id: str, parameters: dict[str, str]) -> str:
    """Begin the run of a sweep, or go on with it (`run_id`); returns its ID. The runs below do not need it
    to be active in this process."""
    with mlflow_answers():
        client = mlflow.MlflowClient()
        if run_id:
            client.update_run(run_id, status="RUNNING")
        else:
            experiment_id = use_experiment(*choose_experiment(experiment))
            run_id = client.create_run(experiment_id, run_name=name).info.run_id
            client.log_batch(run_id, params=[Param(key, value) for key, value in parameters.items()])
    return run_id


def end_children(parent: str) -> None:
    """Call while no trial is at work: runs of lost processes, which MLflow shows as RUNNING, are KILLED."""
    with mlflow_answers():
        client = mlflow.MlflowClient()
        experiment = client.get_run(parent).info.experiment_id
        lost = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
        for run in client.search_runs([experiment], lost):
            client.set_terminated(run.info.run_id, "KILLED")


def log_parent(
    run_id: str,
    points: Sequence[tuple[str, float, int, int]],
    tags: dict[str, str],
    files: Sequence[Path] = (),
    status: str = "",
) -> None:
    """`points` are (metric, value, step, milliseconds), twice the same is one; `status` ends the run."""
    with mlflow_answers():
        client = mlflow.MlflowClient()
        metrics = [Metric(name, value, milliseconds, step) for name, value, step, milliseconds in points]
        log_points(run_id, metrics)
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        for file in files:
            client.log_artifact(run_id, str(file))
        if status:
            client.set_terminated(run_id, status)

"""Scoring runs in MLflow, with the model that scored and the run that trained it.

A tracking server is reached over its REST API, so that scoring needs no mlflow.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.contract.errors import UserError, print_line
from serve.contract.mlflow_tags import CHECKPOINT_TAG, EXPERIMENT_TAGS, PRECISION_TAG
from serve.contract.urls import is_http, redact
from serve.mlflow_models import DEFAULT_URI
from serve.tracking_server import AbsentError, TrackingServer, way_to_a_server

DEFAULT_EXPERIMENT = "purebred"  # of a model whose training run the server does not have
RECORD = "tracking.json"  # in the run directory, written by training


@dataclass(frozen=True)
class ScoringRun:
    name: str
    training_run_id: str
    checkpoint_sha256: str
    """With the training run, it finds the logged model and its registered version."""
    parameters: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    started: int
    """Milliseconds since 1970."""
    ended: int
    model_version: str = ""
    """The registered one that was named, as in pets/3; "": all those of the logged model."""


@dataclass(frozen=True)
class RecordedRun:
    """The MLflow run of a run directory; `tracked` is False without a readable tracking.json."""

    tracked: bool = False
    run_id: str = ""
    """Empty as long as MLflow does not have the run."""
    uri: str = ""
    """Of the store."""


@dataclass(frozen=True)
class ModelOrigin:
    """Origin of a model; empty where the server does not know it."""

    experiment_id: str = ""
    """Of the run that trained it."""
    model_id: str = ""
    versions: tuple[str, ...] = ()
    """Registered ones, as in pets/3."""


def recorded_run(folder: Path) -> RecordedRun:
    try:
        values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return RecordedRun(True, str(values["run_id"]), str(values.get("uri", "")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return RecordedRun()


def run_of_model(model: str) -> RecordedRun:
    """Return the recorded run of RUN/export/model.onnx; an empty one for any other file."""
    file = Path(os.path.realpath(model))
    return recorded_run(file.parents[1]) if file.parent.name == "export" else RecordedRun()


def find_server(model: str) -> TrackingServer | None:
    """Return the server for a scoring run once it answered: MLFLOW_TRACKING_URI, or that of the model's
    training run. None, with a warning, for a store without a server.

    Raises:
        UserError: the server refuses, or its recorded address lacks the password.
        OSError: the server does not answer now.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or run_of_model(model).uri or DEFAULT_URI
    if not is_http(uri):
        print_line(
            f"warning: --track: {redact(uri)} is no tracking server, so this scoring run will not be in "
            f"MLflow. {way_to_a_server(uri)}"
        )
        return None
    if ":***@" in uri:
        raise UserError(f"--track: {uri} is recorded without its password: set MLFLOW_TRACKING_URI")
    server = TrackingServer(uri)
    server.check()
    return server


def log_scoring_run(server: TrackingServer, run: ScoringRun) -> str:
    """Return the ID of the new, finished MLflow run.

    Raises:
        UserError, OSError: the server refuses or does not answer.
    """
    try:
        return _log(server, run)
    except (KeyError, TypeError, AttributeError) as error:  # a field is missing, or of another type
        raise server.unlike_mlflow(error) from error


def _log(server: TrackingServer, run: ScoringRun) -> str:
    source = _find_source(server, run)
    if run.training_run_id and not source.experiment_id:
        print_line(
            f"warning: MLflow at {server.uri} does not have run {run.training_run_id}, which trained this "
            "model: the scoring run is not linked to it. Set MLFLOW_TRACKING_URI to the store of training"
        )
    tags = {
        **run.tags,
        "purebred.training_run_id": run.training_run_id,
        "purebred.model_id": source.model_id,
        "purebred.model_version": run.model_version or ", ".join(source.versions),
        CHECKPOINT_TAG: run.checkpoint_sha256,
    }
    experiment_id = _find_experiment(server, source)
    if experiment_id == source.experiment_id:  # MLflow's table folds it below that run
        tags["mlflow.parentRunId"] = run.training_run_id
    created = server.call(
        "runs/create",
        body={
            "experiment_id": experiment_id,
            "run_name": redact(run.name),
            "start_time": run.started,
            "tags": _pairs(tags),
        },
    )
    run_id: str = created["run"]["info"]["run_id"]
    metrics = [
        {"key": key, "value": value, "timestamp": run.ended, "step": 0}
        for key, value in run.metrics.items()
    ]
    parameters = _pairs({key: redact(value) for key, value in run.parameters.items()})
    ended = {"run_id": run_id, "end_time": run.ended}
    try:
        server.call("runs/log-batch", body={"run_id": run_id, "params": parameters, "metrics": metrics})
        if source.model_id:
            inputs = {"run_id": run_id, "models": [{"model_id": source.model_id}]}
            server.call("runs/log-inputs", body=inputs)
    except (UserError, OSError):
        with suppress(UserError, OSError):  # of a server that is gone too
            server.call("runs/update", body={**ended, "status": "FAILED"})
        raise
    server.call("runs/update", body={**ended, "status": "FINISHED"})
    return run_id


def _find_source(server: TrackingServer, run: ScoringRun) -> ModelOrigin:
    found = _find(server, "runs/get", {"run_id": run.training_run_id}) if run.training_run_id else {}
    if not found:
        return ModelOrigin()
    trained, model_id = found["run"], ""
    for output in trained.get("outputs", {}).get("model_outputs", []):
        info = _find(server, f"logged-models/{output['model_id']}").get("model", {}).get("info", {})
        tags = {tag["key"]: tag["value"] for tag in info.get("tags", [])}
        wanted = run.checkpoint_sha256, run.parameters.get("model_precision", "fp32")
        if (tags.get(CHECKPOINT_TAG), tags.get(PRECISION_TAG, "fp32")) == wanted:
            model_id = output["model_id"]
    found = server.call("model-versions/search", {"filter": f"run_id = '{run.training_run_id}'"})
    versions = [
        f"{version['name']}/{version['version']}"
        for version in found.get("model_versions", [])
        if model_id and version.get("source") == f"models:/{model_id}"
    ]
    return ModelOrigin(trained["info"]["experiment_id"], model_id, tuple(sorted(versions)))


def _find_experiment(server: TrackingServer, source: ModelOrigin) -> str:
    """Return an experiment's ID: that of MLFLOW_EXPERIMENT_NAME, of the training run, or the default's."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
    if not name and (known := source.experiment_id or os.environ.get("MLFLOW_EXPERIMENT_ID", "")):
        return known
    name = name or DEFAULT_EXPERIMENT

    def find() -> dict[str, Any]:
        answer = _find(server, "experiments/get-by-name", {"experiment_name": name})
        found: dict[str, Any] = answer.get("experiment", {})
        if found.get("lifecycle_stage") == "deleted":
            raise UserError(
                f"experiment {name!r} of MLflow at {server.uri} is deleted: mlflow experiments restore "
                f"--experiment-id {found['experiment_id']} brings it back; or set MLFLOW_EXPERIMENT_NAME"
            )
        return found

    found = find()
    if not found:
        try:
            found = server.call("experiments/create", body={"name": name, "tags": _pairs(EXPERIMENT_TAGS)})
        except (UserError, OSError):
            if not (found := find()):  # else another process made it
                raise
    return str(found["experiment_id"])


def _find(server: TrackingServer, endpoint: str, query: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the answer, {} where the server does not have the object."""
    try:
        return server.call(endpoint, query)
    except AbsentError:
        return {}


def _pairs(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in values.items() if value]

"""The only importer of mlflow. Metrics are always written to metrics.jsonl first.

MLflow may be away, slow or broken: training goes on, and what it missed is sent with the next epoch.
"""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource
from mlflow.entities import LoggedModelInput, Metric, Param, RunTag

from serve.metadata import CHECKPOINT_TAG, ModelMetadata
from train.config import TrainConfig

DEFAULT_URI = "sqlite:///mlflow.db"
SYSTEM_METRICS_SECONDS = 5
RUN_TAGS = "PUREBRED_RUN_TAGS"  # environment variable: a sweep tells a trial's run whose child it is (JSON)


class NullTracker:
    """The interface, and what ranks other than 0 have."""

    run_id: str = ""
    rows: Sequence[dict[str, Any]] = ()
    """One for each epoch so far: {"epoch", "time", metric: value, ...}."""

    def start(self, parameters: dict[str, Any], data_source: str, data_digest: str) -> None: ...
    def log_metrics(self, epoch: int, values: dict[str, float]) -> None: ...
    def send(self) -> None: ...
    def log_files(self, paths: list[Path]) -> None: ...
    def end(self, status: str) -> None: ...


class MetricsFile(NullTracker):
    """metrics.jsonl alone: a row a line."""

    rows: list[dict[str, Any]]

    def __init__(self, path: Path, epochs_done: int):
        """Lines after `epochs_done` belong to work that is done again, and are dropped."""
        self.path = path
        self.rows = [row for row in read_metrics(path) if row["epoch"] <= epochs_done]
        if path.exists():
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
            temporary.replace(path)

    def log_metrics(self, epoch: int, values: dict[str, float]) -> None:
        row = {"epoch": epoch, "time": time.time(), **values}
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def build_tracker(
    config: TrainConfig, is_main: bool, path: Path, epochs_done: int, run_id: str
) -> NullTracker:
    """Only rank 0 has one that does anything."""
    if not is_main:
        return NullTracker()
    if not config.track:
        return MetricsFile(path, epochs_done)
    return MlflowTracker(config, path, epochs_done, run_id)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):  # cut off by a crash; its epoch is done again
            rows.append(json.loads(line))
    return rows


class MlflowTracker(MetricsFile):
    """Exactly one MLflow run for a training run, also after a resume (`run_id`)."""

    def __init__(self, config: TrainConfig, path: Path, epochs_done: int, run_id: str):
        super().__init__(path, epochs_done)
        self.config, self.run_id = config, run_id
        self.resumed = bool(run_id)
        self.sent = 0  # rows that MLflow has; after a resume all are sent again, which changes nothing
        self.pending: list[Callable[[], object]] = []

    def start(self, parameters: dict[str, Any], data_source: str, data_digest: str) -> None:
        connect()
        # separate steps: one that fails is tried again, one that was done is not
        self.pending.append(self._open_run)
        self.pending.append(partial(self._log_parameters, parameters))
        if not self.resumed:
            self.pending.append(partial(_log_dataset, data_source, data_digest))
        self.send()

    def log_files(self, paths: list[Path]) -> None:
        """Files go to the run's root, folders below their own name."""
        for path in paths:
            folder = path.name if path.is_dir() else None
            self.pending.append(partial(_log_path, path, folder))
        self.send()

    def end(self, status: str) -> None:
        """`status` is FINISHED, FAILED or KILLED."""
        self.pending.append(lambda: mlflow.end_run(status))
        self.send()
        if self.pending:
            print(f"warning: MLflow missed {len(self.pending)} records; metrics are in {self.path}")

    def _open_run(self) -> None:
        mlflow.set_experiment(self.config.experiment)
        mlflow.set_system_metrics_sampling_interval(SYSTEM_METRICS_SECONDS)
        which = {"run_id": self.run_id} if self.run_id else {"run_name": self.config.name}
        tags = json.loads(os.environ.get(RUN_TAGS, "{}"))
        self.run_id = mlflow.start_run(**which, tags=tags, log_system_metrics=True).info.run_id

    def _log_parameters(self, parameters: dict[str, Any]) -> None:
        """MLflow keeps a parameter's first value: a resumed run logs what changed as resume.EPOCH.NAME."""
        values = {key: str(value) for key, value in parameters.items()}
        if self.resumed:
            known = mlflow.get_run(self.run_id).data.params
            values = {f"resume.{len(self.rows)}.{k}": v for k, v in values.items() if known.get(k, v) != v}
        params = [Param(key, value) for key, value in values.items()]
        for start in range(0, len(params), 100):  # MLflow's limit for one call
            mlflow.MlflowClient().log_batch(self.run_id, params=params[start : start + 100])

    def _send_rows(self) -> None:
        rows = self.rows[self.sent :]
        metrics = [
            Metric(metric_name(name), value, int(row["time"] * 1000), row["epoch"])
            for row in rows
            for name, value in row.items()
            if name not in ("epoch", "time")
        ]
        for start in range(0, len(metrics), 1000):  # MLflow's limit for one call
            mlflow.MlflowClient().log_batch(self.run_id, metrics[start : start + 1000])
        self.sent += len(rows)

    def send(self) -> None:
        """Send what is pending and the new rows, in order, up to the first failure."""
        try:
            with interrupts_deferred():
                while self.pending:
                    self.pending[0]()
                    del self.pending[0]
                    self._send_rows()
                self._send_rows()
        except Exception as error:  # mlflow raises its own, requests' and SQLAlchemy's exceptions
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            print(f"warning: MLflow does not answer; its records are kept for later: {reason}", flush=True)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """SIGTERM and Ctrl-C take effect after the block: one in the middle of a transaction leaves SQLite
    locked, and the run RUNNING for ever, for its last record is refused."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals do not come here, nor may handlers be set
        return
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.signal(number, lambda n, frame: received.append(n)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def _log_path(path: Path, folder: str | None) -> None:
    if folder:
        mlflow.log_artifacts(str(path), folder)
    else:
        mlflow.log_artifact(str(path))


def _log_dataset(source: str, digest: str) -> None:
    dataset = MetaDataset(
        LocalArtifactDatasetSource(str(Path(source).resolve())),
        name=Path(source).name,
        digest=digest[:36],  # MLflow's limit
    )
    mlflow.log_input(dataset, context="training")


def metric_name(name: str) -> str:
    """Class names can hold characters that MLflow refuses, or look like paths that it refuses."""
    parts = re.sub(r"[^/\w.\- :]", "_", name)[:250].split("/")
    return "/".join("_" * max(1, len(part)) if part in ("", ".", "..") else part for part in parts)


def connect() -> None:
    """Tracking URI, and bounds on how long a server that does not answer may hold us up."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(DEFAULT_URI)


def log_verified_model(
    run_id: str,
    model: Path,
    verification: Path,
    image_size: int,
    num_classes: int,
    register: str,
    checkpoint_sha256: str = "",
) -> str:
    """Log the ONNX file with its signature to the run that trained it; returns the model's URI.

    With `register`, also a new version of that registered model, which gets the alias challenger.
    """
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    connect()
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, image_size, image_size, 3), "images")]),
        outputs=Schema(
            [
                TensorSpec(np.dtype(np.float32), (-1, num_classes), "logits"),
                TensorSpec(np.dtype(np.float32), (-1, num_classes), "probabilities"),
            ]
        ),
    )
    client = mlflow.MlflowClient()
    info_of_run = client.get_run(run_id).info
    status = info_of_run.status
    mlflow.set_experiment(experiment_id=info_of_run.experiment_id)  # start_run insists on the active one
    with mlflow.start_run(run_id=run_id):
        mlflow.log_artifact(str(verification), "export")
        info = mlflow.onnx.log_model(
            onnx.load(model),
            name="model",
            signature=signature,
            pip_requirements=["mlflow", "onnx", "onnxruntime", "numpy", "pillow"],
            save_as_external_data=False,
            registered_model_name=register or None,
        )
    client.set_logged_model_tags(info.model_id, {CHECKPOINT_TAG: checkpoint_sha256})
    client.set_terminated(run_id, status)  # reopening must not make a failed run a finished one
    if register:
        client.set_registered_model_alias(register, "challenger", str(info.registered_model_version))
    return str(info.model_uri)


def find_model(run_id: str, checkpoint_sha256: str) -> tuple[str, str, list[str]]:
    """The model that was exported from this checkpoint of this run: (experiment ID, model ID, registered
    versions as in pets/3), each empty where the store knows nothing."""
    connect()
    client = mlflow.MlflowClient()
    try:
        run = client.get_run(run_id)
    except mlflow.MlflowException:  # another store's
        return "", "", []
    outputs = run.outputs.model_outputs if run.outputs else []
    models = [client.get_logged_model(output.model_id) for output in outputs]
    same = [m.model_id for m in models if m.tags.get(CHECKPOINT_TAG) == checkpoint_sha256]
    versions = client.search_model_versions(f"run_id = '{run_id}'") if same else []
    names = sorted(f"{v.name}/{v.version}" for v in versions if v.source == f"models:/{same[-1]}")
    return run.info.experiment_id, same[-1] if same else "", names


def log_scoring_run(
    name: str,
    experiment_id: str,
    parameters: dict[str, str],
    metrics: dict[str, float],
    tags: dict[str, str],
    model_id: str,
    milliseconds: tuple[int, int],
) -> str:
    """A finished run with the model as its input; `milliseconds` since 1970 of start and end."""
    connect()
    client = mlflow.MlflowClient()
    started, ended = milliseconds
    if not experiment_id:
        experiment_id = mlflow.set_experiment(TrainConfig.experiment).experiment_id
    run_id: str = client.create_run(experiment_id, started, tags, name).info.run_id
    points = [Metric(key, value, ended, 0) for key, value in metrics.items()]
    client.log_batch(run_id, points, [Param(key, value) for key, value in parameters.items()])
    if model_id:
        client.log_inputs(run_id, models=[LoggedModelInput(model_id)])
    client.set_terminated(run_id, "FINISHED", ended)
    return run_id


# What train/promotion.py and train/sweep.py ask of MLflow. Unlike a training run they need its answers.


@contextmanager
def mlflow_answers() -> Iterator[None]:
    """Turn mlflow's, requests' and SQLAlchemy's exceptions into a ValueError that names the server."""
    connect()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # they share no base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"MLflow at {mlflow.get_tracking_uri()}: {reason}") from error


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
        raise ValueError(
            f"the aliases of {model} changed meanwhile, from {seen} to {aliases}: run it again"
        )
    with mlflow_answers():
        mlflow.MlflowClient().set_registered_model_alias(model, alias, version)


def fetch_run_file(run_id: str, name: str, folder: Path) -> Path:
    """Download a file that the run logged."""
    with mlflow_answers():
        path = mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path=name, dst_path=str(folder), tracking_uri=mlflow.get_tracking_uri()
        )
    return Path(path)


def child_environment(parent: str, tags: dict[str, str]) -> dict[str, str]:
    """For a training process: its run becomes a child of the run `parent`, with these tags."""
    return {RUN_TAGS: json.dumps({**tags, "mlflow.parentRunId": parent} if parent else tags)}


def open_parent(experiment: str, name: str, run_id: str, parameters: dict[str, str]) -> str:
    """Begin the run of a sweep, or go on with it (`run_id`); returns its ID. The runs below do not need it
    to be active in this process."""
    with mlflow_answers():
        client = mlflow.MlflowClient()
        if run_id:
            client.update_run(run_id, status="RUNNING")
        else:
            experiment_id = mlflow.set_experiment(experiment).experiment_id
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
        for start in range(0, len(metrics), 1000):  # MLflow's limit for one call
            client.log_batch(run_id, metrics[start : start + 1000])
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        for file in files:
            client.log_artifact(run_id, str(file))
        if status:
            client.set_terminated(run_id, status)

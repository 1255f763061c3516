"""MLflow: where it is, and what is logged there besides training runs (train/mlflow_run.py).

No other module imports mlflow: they have it from here.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from train.home import ensure_home

ensure_home()  # mlflow fails when it is imported without

import mlflow as mlflow
import numpy as np
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource
from mlflow.entities import LoggedModelInput, Metric, Param

from serve.metadata import CHECKPOINT_TAG
from train.config import TrainConfig

if TYPE_CHECKING:  # seconds that a training does without
    import onnx
    from mlflow.models import ModelSignature

DEFAULT_URI = "sqlite:///mlflow.db"
LONGEST_METRIC_NAME = 240  # MLflow takes 250, and a hash may follow


def metric_name(name: str) -> str:
    """Class names can hold characters that MLflow refuses, or look like paths that it refuses. A name that
    had to be changed ends with a hash of the original, so that different names stay different."""
    parts = re.sub(r"[^/\w.\- :]", "_", name)[:LONGEST_METRIC_NAME].split("/")
    known = "/".join("_" * max(1, len(part)) if part in ("", ".", "..") else part for part in parts)
    if known == name:
        return name
    return f"{known}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def connect() -> None:
    """Tracking URI, and bounds on how long a server that does not answer may hold us up.

    No retries below ours: a request to make a run that was answered too late would be made twice.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(DEFAULT_URI)


def log_points(run_id: str, points: list[Metric]) -> None:
    for start in range(0, len(points), 1000):  # MLflow's limit for one call
        mlflow.MlflowClient().log_batch(run_id, points[start : start + 1000])


def log_dataset(source: str, digest: str) -> None:
    dataset = MetaDataset(
        LocalArtifactDatasetSource(source),
        name=source.rstrip("/").rpartition("/")[2],
        digest=digest[:36],  # MLflow's limit
    )
    mlflow.log_input(dataset, context="training")


def log_verified_model(
    run_id: str,
    model: Path,
    verification: Path,
    image_size: int,
    num_classes: int,
    metrics: dict[str, float],
    register: str,
    checkpoint_sha256: str = "",
) -> str:
    """Log the ONNX file with its signature and metrics to the run that trained it; returns the model's URI.

    With `register`, also a new version of that registered model, which gets the alias challenger.
    """
    import onnx

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # nobody trains meanwhile
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    connect()
    client = mlflow.MlflowClient()
    info_of_run = client.get_run(run_id).info
    mlflow.set_experiment(experiment_id=info_of_run.experiment_id)  # start_run insists on the active one
    try:
        with mlflow.start_run(run_id=run_id, log_system_metrics=False):
            mlflow.log_artifact(str(verification), "export")
            proto = onnx.load(model)
            info = mlflow.onnx.log_model(
                proto,
                name="model",
                signature=_signature(proto, image_size, num_classes),
                pip_requirements=["mlflow", "onnx", "onnxruntime", "numpy", "pillow"],
                save_as_external_data=False,
                registered_model_name=register or None,
            )
            mlflow.log_metrics(metrics, model_id=info.model_id)
    finally:  # reopening must change neither how the training ended nor when
        client.set_terminated(run_id, info_of_run.status, info_of_run.end_time)
    client.set_logged_model_tags(info.model_id, {CHECKPOINT_TAG: checkpoint_sha256})
    if register:
        client.set_registered_model_alias(register, "challenger", str(info.registered_model_version))
    return str(info.model_uri)


def _signature(model: "onnx.ModelProto", image_size: int, num_classes: int) -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    widths = {"logits": num_classes, "probabilities": num_classes}
    for output in model.graph.output:  # perhaps embeddings
        widths.setdefault(output.name, output.type.tensor_type.shape.dim[1].dim_value or -1)
    outputs = [TensorSpec(np.dtype(np.float32), (-1, width), name) for name, width in widths.items()]
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, image_size, image_size, 3), "images")]),
        outputs=Schema(outputs),
    )


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

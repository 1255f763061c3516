"""For tests of tracking: a tracker, and what a store has of its runs."""

from pathlib import Path
from typing import Any

import mlflow
import onnx
import pytest
from mlflow.entities import Run
from onnx import TensorProto, helper
from serve_model import METADATA

from export.mlflow_package import ServedModel
from serve.contract.metadata import METADATA_KEY, ModelMetadata
from train.config import TrainConfig
from train.tracking.client import TrackingStore
from train.tracking.mlflow_tracker import MlflowTracker
from train.tracking.registry import publish_model

DIGEST = "0123456789abcdef" * 4
PARAMETERS: dict[str, Any] = {"lr": 0.1, "model": "simple_cnn", "dropout": None}
REFUSES = "http://127.0.0.1:9"
METRICS = [{"train/loss": 0.9, "val/accuracy": 0.5}, {"train/loss": 0.4, "val/accuracy": 0.75}]


def use(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)


def tracker(epochs_done: int = 0, run_id: str = "") -> MlflowTracker:
    return MlflowTracker(TrainConfig(name="small"), Path("metrics.jsonl"), epochs_done, run_id)


def runs(uri: str) -> list[Run]:
    client = mlflow.MlflowClient(uri)
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in mlflow.MlflowClient(uri).get_metric_history(run_id, name)]


def whole_run(status: str = "FINISHED") -> MlflowTracker:
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST))
    for epoch, values in enumerate(METRICS, 1):
        t.log_metrics(epoch, values)
    t.end(status)
    return t


def onnx_file(path: Path, metadata: ModelMetadata) -> Path:
    """The smallest graph that MLflow accepts, with a model file's metadata."""
    shape = ["batch", 2]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: metadata.to_json()})
    onnx.save(model, path)
    return path


def log_to_mlflow(file: Path, metadata: ModelMetadata = METADATA, register: str = "") -> str:
    """Return the URI of the logged model."""
    record = file.with_name("verification.json")
    record.write_text("{}")
    run_id = whole_run().run_id
    return "models:/" + publish_model(
        TrackingStore(), run_id, file, metadata, record, {}, ServedModel(file, metadata), register
    )

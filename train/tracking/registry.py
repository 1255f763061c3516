"""Logged and registered models in MLflow, for export and promotion."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.contract.errors import UserError
from serve.contract.files import file_sha256
from serve.contract.metadata import BEST_CHECKPOINT_TAG, CHECKPOINT_TAG, PRECISION_TAG, ModelMetadata
from train.tracking.client import TrackingStore, mlflow

if TYPE_CHECKING:  # seconds that a promotion does without
    import onnx

MODEL_TAG = "purebred.model_sha256"  # of a logged model's file
CHALLENGER = "challenger"


@dataclass(frozen=True)
class ModelVersion:
    version: str
    run_id: str
    metadata: ModelMetadata
    """That of the registered ONNX file."""


def read_aliases(store: TrackingStore, model: str) -> dict[str, str]:
    """Return alias -> version of a registered model."""
    with store.errors():
        aliases = store.client.get_registered_model(model).aliases
    return {alias: str(version) for alias, version in aliases.items()}  # some stores give numbers


def read_version(store: TrackingStore, model: str, version: str) -> ModelVersion:
    with store.errors():
        run_id = store.client.get_model_version(model, version).run_id
        mlflow.set_tracking_uri(store.client.tracking_uri)
        proto = mlflow.onnx.load_model(f"models:/{model}/{version}")
    metadata = ModelMetadata.from_props({prop.key: prop.value for prop in proto.metadata_props})
    return ModelVersion(version, run_id, metadata)


def move_alias(
    store: TrackingStore, model: str, alias: str, version: str, expected: dict[str, str]
) -> None:
    """Give the alias to this version if all aliases still are the expected ones.

    MLflow has no compare-and-set: this look just before narrows the race to milliseconds, in which the
    later of two wins.
    """
    aliases = read_aliases(store, model)
    if aliases != expected:
        raise UserError(
            f"the aliases of {model} changed meanwhile, from {expected} to {aliases}: run it again"
        )
    with store.errors():
        store.client.set_registered_model_alias(model, alias, version)


def fetch_run_file(store: TrackingStore, run_id: str, name: str, folder: Path) -> Path:
    """Download a file that the run logged."""
    with store.errors():
        return Path(store.client.download_artifacts(run_id, name, str(folder)))


def check_registrable(store: TrackingStore, run_id: str, name: str) -> None:
    """Raise RefusedError if the run is not in the store, or no registered model can have the name."""
    with store.errors():
        store.client.get_run(run_id)
        try:
            store.client.get_registered_model(name)
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise


def find_by_checkpoint(store: TrackingStore, checkpoint_sha256: str) -> str:
    """Return the ID of the run whose best checkpoint this is, or ""."""
    with store.errors():
        experiments = [experiment.experiment_id for experiment in store.client.search_experiments()]
        by_tag = f"tags.`{BEST_CHECKPOINT_TAG}` = '{checkpoint_sha256}'"
        found = store.client.search_runs(experiments, by_tag, max_results=1)
    return str(found[0].info.run_id) if found else ""


def publish_model(
    store: TrackingStore,
    run_id: str,
    file: Path,
    metadata: ModelMetadata,
    verification: Path,
    metrics: dict[str, float],
    register: str = "",
) -> str:
    """Log the ONNX file to the run that trained it, unless it is there, with the present record of its
    verification; returns the model's ID, "" for a file that is not verified any more.

    With `register`, the model has a version of this registered model, with the alias challenger.
    """
    with store.errors():
        client, sha256 = store.client, file_sha256(file)
        run = client.get_run(run_id)
        store.check_artifact_folder(run.info.artifact_uri)
        mlflow.set_tracking_uri(client.tracking_uri)  # mlflow.onnx and mlflow.register_model take no other
        model_id = find_logged_model(client, run, sha256)
        if not model_id and not metadata.verified:
            return ""
        client.log_artifact(run_id, str(verification), "export")
        if not model_id:
            model_id = _log_model(client, run, file, metadata, metrics)
            tags = {CHECKPOINT_TAG: metadata.checkpoint_sha256, PRECISION_TAG: metadata.precision}
            client.set_logged_model_tags(model_id, {**tags, MODEL_TAG: sha256})
        client.log_model_artifact(model_id, str(verification))
        if register:
            source = f"models:/{model_id}"
            known = [v for v in client.search_model_versions(f"name = '{register}'") if v.source == source]
            version = known[0] if known else mlflow.register_model(source, register)
            client.set_registered_model_alias(register, CHALLENGER, str(version.version))
    return model_id


def find_logged_model(client: Any, run: Any, sha256: str) -> str:
    """Return the ID of the run's logged model whose file has this sha256, or ""."""
    for output in run.outputs.model_outputs if run.outputs else []:
        try:
            if client.get_logged_model(output.model_id).tags.get(MODEL_TAG) == sha256:
                return str(output.model_id)
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # somebody deleted it
                raise
    return ""


def _log_model(
    client: Any, run: Any, file: Path, metadata: ModelMetadata, metrics: dict[str, float]
) -> str:
    import onnx

    proto, run_id = onnx.load(file), run.info.run_id
    name = "model" if metadata.precision == "fp32" else f"model-{metadata.precision}"
    made = client.create_logged_model(run.info.experiment_id, name, run_id, params=run.data.params)
    mlflow.onnx.log_model(
        proto,
        model_id=made.model_id,
        run_id=run_id,
        signature=_signature(proto, metadata),
        pip_requirements=["mlflow", "onnx", "onnxruntime", "numpy", "pillow"],
        save_as_external_data=False,
    )
    now = int(time.time() * 1000)
    values = [
        mlflow.entities.Metric(key, value, now, 0, model_id=made.model_id, run_id=run_id)
        for key, value in metrics.items()
    ]
    client.log_batch(run_id, values)
    return str(made.model_id)


def _signature(model: "onnx.ModelProto", metadata: ModelMetadata) -> Any:
    size, num_classes = metadata.preprocess.size, len(metadata.class_names)
    widths = {"logits": num_classes, "probabilities": num_classes}
    for output in model.graph.output:  # perhaps embeddings
        widths.setdefault(output.name, output.type.tensor_type.shape.dim[1].dim_value or -1)
    spec, schema = mlflow.types.TensorSpec, mlflow.types.Schema
    outputs = [spec(np.dtype(np.float32), (-1, width), name) for name, width in widths.items()]
    pixels = spec(np.dtype(np.uint8), (-1, size, size, 3), "images")
    return mlflow.models.ModelSignature(inputs=schema([pixels]), outputs=schema(outputs))

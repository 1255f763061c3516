"""Logged and registered models in MLflow, for export and promotion."""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.contract.errors import UserError
from serve.contract.files import file_sha256
from serve.contract.metadata import ModelMetadata
from serve.contract.mlflow_tags import BEST_CHECKPOINT_TAG, CHECKPOINT_TAG, PRECISION_TAG
from train.tracking.client import TrackingStore, mlflow

MODEL_TAG = "purebred.model_sha256"  # of a logged model's file
CHALLENGER = "challenger"
NO_STEP = -1  # a model is given the run's metrics of its step, and at 0 those are the system's
FIRST_CLASSES = 10  # named in the description of a version
MOST_CHARACTERS = 4000  # of it; MLflow's limit is 5000


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
            f"the aliases of {model} changed meanwhile, from {expected} to {aliases}: repeat the command"
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
        _search_versions(store.client, name)  # which takes no name with both kinds of quotes


def _search_versions(client: Any, name: str) -> Any:
    """Return the versions of a registered model."""
    quote = '"' if "'" in name else "'"
    return client.search_model_versions(f"name = {quote}{name}{quote}")


def find_by_checkpoint(store: TrackingStore, checkpoint_sha256: str) -> str:
    """Return the ID of the run whose best checkpoint this is, or ""."""
    with store.errors():
        by_tag = f"tags.`{BEST_CHECKPOINT_TAG}` = '{checkpoint_sha256}'"
        page: str | None = None
        while page is None or page:
            experiments = store.client.search_experiments(page_token=page)  # a thousand at most
            ids = [experiment.experiment_id for experiment in experiments]
            if found := store.client.search_runs(ids, by_tag, max_results=1):
                return str(found[0].info.run_id)
            page = experiments.token or ""
    return ""


def publish_model(
    store: TrackingStore,
    run_id: str,
    file: Path,
    metadata: ModelMetadata,
    verification: Path,
    metrics: dict[str, float],
    flavor: Any,
    register: str = "",
) -> str:
    """Log the ONNX file to the run that trained it, unless it is there, with the present record of its
    verification; returns the model's ID, "" for a file that is not verified any more.

    `flavor` has the function `save_model` that mlflow.models.Model.log calls. With `register`, the model
    has a version of this registered model, with the alias challenger.
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
            model_id = _log_model(client, run, metadata, metrics, flavor)
            tags = {CHECKPOINT_TAG: metadata.checkpoint_sha256, PRECISION_TAG: metadata.precision}
            client.set_logged_model_tags(model_id, {**tags, MODEL_TAG: sha256})
        client.log_model_artifact(model_id, str(verification))
        if register:
            source = f"models:/{model_id}"
            known = [v for v in _search_versions(client, register) if v.source == source]
            version = known[0] if known else mlflow.register_model(source, register)
            client.set_registered_model_alias(register, CHALLENGER, str(version.version))
        _describe_versions(client, run, model_id, metadata, metrics)
    return model_id


def _describe_versions(
    client: Any, run: Any, model_id: str, metadata: ModelMetadata, metrics: Mapping[str, float]
) -> None:
    """Give each registered version of a logged model tags with what it is, and a description unless it has
    one, which may be somebody's own."""
    accuracy = next((value for name, value in metrics.items() if name.endswith("/accuracy")), math.nan)
    verified = ", ".join(f"{p.provider}:{p.precision}" for p in metadata.verified)
    tags = {
        "purebred.accuracy": f"{accuracy:.4f}",
        "purebred.verified": verified or "nothing",
        "purebred.classes": str(len(metadata.class_names)),
        "purebred.data_digest": metadata.data_digest,
        "purebred.model": metadata.model,
    }
    names = ", ".join(metadata.class_names[:FIRST_CLASSES])
    more = len(metadata.class_names) - FIRST_CLASSES
    description = (
        f"{metadata.model} of run {metadata.run_name}, {metadata.precision}: accuracy {accuracy:.4f} on "
        f"its validation images as served; {len(metadata.class_names)} classes: {names}"
        + (f" and {more} more" if more > 0 else "")
    )
    for version in client.search_model_versions(f"run_id = '{run.info.run_id}'"):
        if version.source != f"models:/{model_id}":
            continue
        for name, value in tags.items():
            if value:
                client.set_model_version_tag(version.name, version.version, name, value)
        if not version.description:
            client.update_model_version(version.name, version.version, description[:MOST_CHARACTERS])


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


def logged_name(metadata: ModelMetadata) -> str:
    """Return the name of a logged model: that of its run, as MLflow takes it."""
    name = re.sub(r"""[/:.%"']""", "_", metadata.run_name) or "model"
    return name if metadata.precision == "fp32" else f"{name}-{metadata.precision}"


def _log_model(
    client: Any, run: Any, metadata: ModelMetadata, metrics: dict[str, float], flavor: Any
) -> str:
    run_id = run.info.run_id
    name = logged_name(metadata)
    made = client.create_logged_model(run.info.experiment_id, name, run_id, params=run.data.params)
    mlflow.models.Model.log(
        None, flavor, model_id=made.model_id, run_id=run_id, validate_serving_input=False, step=NO_STEP
    )
    now = int(time.time() * 1000)
    values = [
        mlflow.entities.Metric(key, value, now, 0, model_id=made.model_id, run_id=run_id)
        for key, value in metrics.items()
    ]
    client.log_batch(run_id, values)
    return str(made.model_id)

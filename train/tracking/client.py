"""MLflow: where it is, and what is logged there besides training runs (train/tracking/mlflow_run.py).

No other module imports mlflow: they have it from here.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from train.home import ensure_home

ensure_home()  # mlflow fails when it is imported without

import mlflow as mlflow
import numpy as np
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource
from mlflow.entities import Metric

from serve.contract.files import file_sha256
from serve.contract.metadata import BEST_CHECKPOINT_TAG, CHECKPOINT_TAG, PRECISION_TAG
from serve.contract.urls import split_credentials
from train.tracking.mlflow_errors import HIDDEN, RefusedError, explain, may_pass, without_passwords

if TYPE_CHECKING:  # seconds that a training does without
    import onnx
    from mlflow.models import ModelSignature

DEFAULT_URI = "sqlite:///mlflow.db"
MODEL_TAG = "purebred.model_sha256"  # of a logged model's file
DEFAULT_EXPERIMENT = "purebred"
SQLITE = re.compile(r"(sqlite[^:]*:///)(?!file:)([^:?]+)$")
NO_SUCH_RUN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter of what is no ID
LONGEST_METRIC_NAME = 240  # MLflow takes 250, and a hash may follow


def metric_name(name: str) -> str:
    """Class names can hold characters that MLflow refuses, or look like paths that it refuses. A name that
    had to be changed ends with a hash of the original, so that different names stay different."""
    parts = re.sub(r"[^/\w.\- :]", "_", name)[:LONGEST_METRIC_NAME].split("/")
    known = "/".join("_" * max(1, len(part)) if part in ("", ".", "..") else part for part in parts)
    if known == name:
        return name
    return f"{known}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


_ours: dict[str, str] = {}
"""What this process put into the environment, which may be changed; what the user put there may not."""


def connect(recorded: str = "", run_id: str = "", retries: int = 0, seconds: int = 10) -> str:
    """Set the tracking URI, and bounds on how long a server that does not answer may hold us up.

    It is MLFLOW_TRACKING_URI, else the `recorded` one of a run directory, whose run has this ID there, else
    the default. Returns `store_uri`.

    While training there are no `retries` below ours: a request to make a run that was answered too late
    would be made twice.

    Raises:
        RefusedError: the recorded store is a file that is not there, or needs a password.
    """
    for name, value in (("MAX_RETRIES", retries), ("TIMEOUT", seconds)):
        name = f"MLFLOW_HTTP_REQUEST_{name}"
        if os.environ.get(name) in (None, _ours.get(name)):
            os.environ[name] = _ours[name] = str(value)
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if given in ("", _ours.get("MLFLOW_TRACKING_URI")):
        if recorded:
            _check_recorded(recorded, run_id)
        given = _ours["MLFLOW_TRACKING_URI"] = recorded or DEFAULT_URI
        mlflow.set_tracking_uri(given)  # which writes it into the environment
    if given.startswith(("http://", "https://")):
        address, user, password = split_credentials(given)
        if user and password:  # else they are in every message of mlflow and requests
            os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = user, password
            os.environ["MLFLOW_TRACKING_URI"] = address
    else:
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 2  # ten tries take 100 s, and ours follow
    return store_uri()


def store_uri() -> str:
    """The store's URI, without a password, and with an absolute path: it is the same from any folder."""
    uri = without_passwords(mlflow.get_tracking_uri())
    found, here = SQLITE.fullmatch(uri), str(Path.cwd())
    if found is None or found[2].startswith("/") or "?" in here:
        return uri
    return f"{found[1]}{here}/{found[2]}"


def _check_recorded(recorded: str, run_id: str) -> None:
    if f":{HIDDEN}@" in recorded:
        raise RefusedError(
            f"the run was logged to {recorded}, whose password is not kept: set MLFLOW_TRACKING_URI to it"
        )
    found = SQLITE.fullmatch(recorded)
    if found is None or Path(found[2]).is_file():
        return
    if run_id or not Path(found[2]).parent.is_dir():  # MLflow would make an empty one, and the folder
        raise RefusedError(
            f"the MLflow store that this run was logged to, {recorded}, does not exist here: set "
            "MLFLOW_TRACKING_URI to where it is"
        )


def check_artifact_folder(uri: str, artifact_uri: str) -> None:
    """A server that takes no files names a folder, which MLflow would make here, for nobody to find.

    Raises:
        RefusedError: the store at `uri` is on another machine, and the folder is not here.
    """
    server, folder = urlsplit(uri), urlsplit(artifact_uri)
    if server.hostname in (None, "localhost", "127.0.0.1", "::1") or folder.scheme not in ("", "file"):
        return
    root = Path(folder.path, "../../..").resolve()  # above experiment, run and "artifacts"
    if not root.is_dir():
        raise RefusedError(
            f"the server at {uri} keeps files in {root}, a folder of its machine that is not here: mount "
            "it, or start the server with --serve-artifacts and --artifacts-destination, and give a new "
            "--experiment"
        )


@contextmanager
def explained(recorded: str = "") -> Iterator[None]:
    """mlflow's, requests' and SQLAlchemy's exceptions share no base: make them these.

    Raises:
        RefusedError: MLflow refuses; the message has the way out.
        ConnectionError: the same call may succeed later.
    """
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:
        text = explain(error, store_uri(), recorded)
        if may_pass(error):
            raise ConnectionError(f"MLflow at {store_uri()} does not answer: {text}") from error
        raise RefusedError(f"MLflow at {store_uri()} refuses it: {text}") from error


def choose_experiment(name: str) -> tuple[str, str]:
    """Name or ID of the experiment, the other one empty: the given name, or what MLflow's environment
    variables say, or the default."""
    name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
    experiment_id = "" if name else _given_experiment_id()
    return (name or ("" if experiment_id else DEFAULT_EXPERIMENT)), experiment_id


def _given_experiment_id() -> str:
    """MLFLOW_EXPERIMENT_ID, unless mlflow.set_experiment wrote it in this process."""
    active = getattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    if os.environ.get("MLFLOW_EXPERIMENT_ID") == active:
        os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
    return os.environ.get("MLFLOW_EXPERIMENT_ID", "")


def use_experiment(name: str, experiment_id: str = "") -> str:
    """Make an experiment the active one, by its ID if there is one; returns its ID."""
    given = _given_experiment_id()
    try:
        if experiment_id:
            return str(mlflow.set_experiment(experiment_id=experiment_id).experiment_id)
        return str(mlflow.set_experiment(name).experiment_id)
    finally:  # MLflow writes the variable, and the next run in this process would obey it
        os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
        if given:
            os.environ["MLFLOW_EXPERIMENT_ID"] = given


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
    precision: str = "fp32",
    recorded_uri: str = "",
) -> str:
    """Log the ONNX file with its signature and metrics to the run that trained it; returns the model's URI.

    With `register`, also a new version of that registered model, which gets the alias challenger.
    `precision` is that of the file's own layers, `recorded_uri` the store's by the run directory.

    Raises:
        RefusedError, ConnectionError: as `explained` says.
    """
    import onnx

    with explained(recorded_uri):
        connect(recorded_uri, run_id, retries=3, seconds=120)  # nobody trains meanwhile
        client = mlflow.MlflowClient()
        info_of_run = client.get_run(run_id).info
        check_artifact_folder(store_uri(), info_of_run.artifact_uri)
        use_experiment("", info_of_run.experiment_id)  # start_run insists on the active one
        try:
            with mlflow.start_run(run_id=run_id, log_system_metrics=False):
                mlflow.log_artifact(str(verification), "export")
                proto = onnx.load(model)
                info = mlflow.onnx.log_model(
                    proto,
                    name="model" if precision == "fp32" else f"model-{precision}",
                    signature=_signature(proto, image_size, num_classes),
                    pip_requirements=["mlflow", "onnx", "onnxruntime", "numpy", "pillow"],
                    save_as_external_data=False,
                    registered_model_name=register or None,
                )
                mlflow.log_metrics(metrics, model_id=info.model_id)
        finally:  # reopening must change neither how the training ended nor when
            client.set_terminated(run_id, info_of_run.status, info_of_run.end_time)
        tags = {CHECKPOINT_TAG: checkpoint_sha256, PRECISION_TAG: precision, MODEL_TAG: file_sha256(model)}
        client.set_logged_model_tags(info.model_id, tags)
        client.log_model_artifact(info.model_id, str(verification))
        if register:
            client.set_registered_model_alias(register, "challenger", str(info.registered_model_version))
        return str(info.model_uri)


def check_registrable(run_id: str, name: str, recorded_uri: str = "") -> None:
    """Raise mlflow's exception if the run is not in the store, or no registered model can have the name."""
    connect(recorded_uri, run_id, retries=3, seconds=120)
    client = mlflow.MlflowClient()
    client.get_run(run_id)
    try:
        client.get_registered_model(name)
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def find_logged_model(run_id: str, model_sha256: str, recorded_uri: str = "") -> str:
    """ID of the run's logged model with these bytes; "" when there is none."""
    connect(recorded_uri, run_id, retries=3, seconds=120)
    client = mlflow.MlflowClient()
    outputs = client.get_run(run_id).outputs
    for output in outputs.model_outputs if outputs else []:
        try:
            tags = client.get_logged_model(output.model_id).tags
        except mlflow.MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # somebody deleted it
                continue
            raise
        if tags.get(MODEL_TAG) == model_sha256:
            return str(output.model_id)
    return ""


def log_verification(run_id: str, model_id: str, verification: Path) -> None:
    """Replace the verification record of a logged model, and so of every registered version of it."""
    client = mlflow.MlflowClient()
    client.log_model_artifact(model_id, str(verification))
    client.log_artifact(run_id, str(verification), "export")


def register_logged_model(model_id: str, name: str) -> None:
    """Give the alias challenger to the version of this logged model, made if there is none."""
    client = mlflow.MlflowClient()
    source = f"models:/{model_id}"
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.source == source]
    version = known[0] if known else mlflow.register_model(source, name)
    client.set_registered_model_alias(name, "challenger", str(version.version))


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


def find_training_run(run_id: str, checkpoint_sha256: str, recorded_uri: str = "") -> str:
    """This run's ID if the store has it, else that of the run whose best checkpoint this is, else ""."""
    connect(recorded_uri)
    client = mlflow.MlflowClient()
    if run_id:
        try:
            return str(client.get_run(run_id).info.run_id)
        except mlflow.MlflowException as error:
            if error.error_code not in NO_SUCH_RUN:
                raise
    if not checkpoint_sha256:
        return ""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    exported = f"tags.`{BEST_CHECKPOINT_TAG}` = '{checkpoint_sha256}'"
    found = client.search_runs(experiments, exported, max_results=1)
    return str(found[0].info.run_id) if found else ""

"""MLflow's client, which no other module imports, and the store that it reaches."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from train.home import ensure_home

ensure_home()  # mlflow fails when it is imported without
os.environ.setdefault(
    "MLFLOW_LOGGING_LEVEL", "WARNING"
)  # its database and system metrics report each start

import mlflow as mlflow
import mlflow.data.meta_dataset
import mlflow.data.sources
import mlflow.system_metrics.system_metrics_monitor
import mlflow.tracking.context.registry

from serve.contract.mlflow_tags import EXPERIMENT_TAGS, VIEW_TAG
from serve.contract.urls import is_http, split_credentials
from train.tracking.errors import HIDDEN, RefusedError, translate, without_passwords

DEFAULT_URI = "sqlite:///mlflow.db"
DEFAULT_EXPERIMENT = "purebred"
SECONDS = 10  # until an answer, while training
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
UPLOAD_SECONDS = 600  # a server answers when it has passed a file on to its own store
SQLITE = re.compile(r"(sqlite[^:]*:///)(?!file:)([^:?]+)$")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class TrackingStore:
    """A tracking store: MLFLOW_TRACKING_URI, else the `recorded` one of a run directory, else the default.

    While training there are no `retries` below ours: a request to make a run that was answered too late
    would be made twice. Raises RefusedError if the recorded store is a file that does not exist or needs a
    password, or this is no store; ConnectionError if it does not answer.
    """

    def __init__(self, recorded: str = "", run_id: str = "", retries: int = 0, seconds: int = SECONDS):
        """`run_id` is that of the run directory, empty as long as MLflow does not have the run."""
        for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):  # of a file, with its line end
            if value := os.environ.get(f"MLFLOW_TRACKING_{name}"):
                os.environ[f"MLFLOW_TRACKING_{name}"] = value.strip()
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(retries))
        os.environ.setdefault(TIMEOUT, str(seconds))
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if recorded and not uri:
            _check_recorded(recorded, run_id)
        uri = _absolute(uri or recorded or DEFAULT_URI)
        if is_http(uri):
            address, user, password = split_credentials(uri)
            if user and password:  # else they are in every message of mlflow and requests
                os.environ["MLFLOW_TRACKING_USERNAME"] = user
                os.environ["MLFLOW_TRACKING_PASSWORD"] = password
                uri = address
        else:
            from mlflow.store.db import utils

            utils.MAX_RETRY_COUNT = 2  # ten tries take 100 s, and ours follow
        self.recorded, self.uri = recorded, without_passwords(uri)
        with self.errors():
            self.client = mlflow.MlflowClient(uri)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise RefusedError or ConnectionError in place of what MLflow and its libraries raise."""
        try:
            yield
        except Exception as error:
            raise translate(error, self.uri, self.recorded) from error

    def find_run(self, run_id: str) -> Any:
        """Return the run, None if the store has none of this ID."""
        try:
            return self.client.get_run(run_id)
        except mlflow.MlflowException as error:
            # INVALID_PARAMETER_VALUE: the text is not a run ID
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def experiment_id(self, name: str, experiment_id: str = "") -> str:
        """Return the ID of an experiment that can be used, and make one of this name if there is none."""
        client = self.client
        known = (
            client.get_experiment(experiment_id) if experiment_id else client.get_experiment_by_name(name)
        )
        if known is None:
            try:
                return str(client.create_experiment(name, tags=EXPERIMENT_TAGS))
            except mlflow.MlflowException:
                known = client.get_experiment_by_name(name)  # another process made it
                if known is None:
                    raise
        if known.lifecycle_stage == "deleted":
            raise RefusedError(
                f"experiment {known.name!r} in {self.uri} is deleted: mlflow experiments restore "
                f"--experiment-id {known.experiment_id} brings it back; or give another --experiment"
            )
        if VIEW_TAG[0] not in known.tags:
            with suppress(mlflow.MlflowException):  # who may not edit the experiment can log to it
                client.set_experiment_tag(known.experiment_id, *VIEW_TAG)
        return str(known.experiment_id)

    def send_each(
        self, items: Sequence[Any], send: Callable[[Sequence[Any]], None]
    ) -> list[tuple[str, RefusedError]]:
        """Send parameters or metrics at once, or, where MLflow refuses some, all others. Return the keys of
        those, each with its error."""
        if not items:
            return []
        try:
            with self.errors():
                send(items)
        except RefusedError as error:
            if not error.about_values:
                raise
            if len(items) == 1:
                return [(items[0].key, error)]
            half = len(items) // 2
            return self.send_each(items[:half], send) + self.send_each(items[half:], send)
        return []

    def check_artifact_folder(self, artifact_uri: str) -> None:
        """Raise RefusedError if a run's files would end in a folder that MLflow makes here, for nobody to
        find: a server that takes no files names one of its own machine."""
        server, folder = urlsplit(self.uri), urlsplit(artifact_uri)
        if server.hostname is None or folder.scheme not in ("", "file"):
            return
        root = Path(folder.path, "../../..").resolve()  # above experiment, run and "artifacts"
        # this machine's server makes the folder with the first file; the address may be that of a tunnel
        if not (root.parent if server.hostname in LOOPBACK else root).is_dir():
            raise RefusedError(
                f"the server at {self.uri} keeps files in {root}, a folder of its own machine: mount it, "
                "or start the server with --serve-artifacts and --artifacts-destination, and give a new "
                "--experiment"
            )


@contextmanager
def patience_for_files() -> Iterator[None]:
    """Let requests wait UPLOAD_SECONDS in place of SECONDS; another timeout is the user's, and stays."""
    before = os.environ[TIMEOUT]
    if before == str(SECONDS):
        os.environ[TIMEOUT] = str(UPLOAD_SECONDS)
    try:
        yield
    finally:
        os.environ[TIMEOUT] = before


def dataset_input(source: str, digest: str, context: str) -> Any:
    """Return the mlflow.entities.DatasetInput of the data set at a path or URL; `context` says what it is
    for, as in "training"."""
    values = mlflow.data.meta_dataset.MetaDataset(
        mlflow.data.sources.LocalArtifactDatasetSource(source),
        name=source.rstrip("/").rpartition("/")[2],
        digest=digest[:36],  # MLflow's limit
    ).to_dict()
    tag = mlflow.entities.InputTag("mlflow.data.context", context)
    return mlflow.entities.DatasetInput(mlflow.entities.Dataset(**values), [tag])


def choose_experiment(name: str) -> tuple[str, str]:
    """Return name and ID of the experiment, the other one empty: the given name, or what MLflow's
    environment variables name, or the default."""
    name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
    experiment_id = "" if name else os.environ.get("MLFLOW_EXPERIMENT_ID", "")
    return (name or ("" if experiment_id else DEFAULT_EXPERIMENT)), experiment_id


def _absolute(uri: str) -> str:
    """Return the URI of a store, a SQLite file's with its folder: it is the same from any folder."""
    found, folder = SQLITE.fullmatch(uri), str(Path.cwd())
    if found is None or found[2].startswith("/") or "?" in folder:
        return uri
    return f"{found[1]}{folder}/{found[2]}"


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
            f"the run was logged to {recorded}, which does not exist on this machine: set "
            "MLFLOW_TRACKING_URI to its present address"
        )

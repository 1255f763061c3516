"""Log a scoring run to MLflow: which model scored what, and the training run that the model came from.

A tracking server is spoken to over its REST API, so that scoring images need no mlflow. A local store
(a SQLite file, a folder) has no such API: there mlflow, installed with training, is started beside us.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from serve.contract.errors import UserError
from serve.contract.metadata import BEST_CHECKPOINT_TAG, CHECKPOINT_TAG, PRECISION_TAG
from serve.contract.urls import redact
from serve.tracking_server import TrackingServer, UntrustedError

DEFAULT_URI = "sqlite:///mlflow.db"
DEFAULT_EXPERIMENT = "purebred"  # of a model whose training run this store does not know
RECORD = "tracking.json"  # in the run directory: what training knows of its MLflow run
REQUEST_SECONDS = 20.0
MAX_ANSWER_BYTES = 1 << 24
MAX_EXPERIMENTS = 1000  # in one answer
LOCAL_STORE_SECONDS = 300.0
LOCAL_LOGGER = Path(__file__).resolve().parents[1] / "export" / "lineage.py"


@dataclass(frozen=True)
class ScoringRun:
    name: str
    training_run_id: str
    checkpoint_sha256: str
    """With the training run, what finds the logged model and its registered version."""
    parameters: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    started: int
    """Milliseconds since 1970."""
    ended: int


@dataclass(frozen=True)
class Recorded:
    """What a run directory says of its MLflow run; `tracked` is False where it says nothing."""

    tracked: bool = False
    run_id: str = ""
    """Empty as long as MLflow does not have the run."""
    uri: str = ""
    """Of the store."""


@dataclass(frozen=True)
class Source:
    """Where in the store the model came from; empty where the store knows nothing."""

    training_run_id: str = ""
    experiment_id: str = ""
    model_id: str = ""
    versions: tuple[str, ...] = ()
    """Registered ones, as in pets/3."""

    def warning(self, run: ScoringRun) -> str:
        """Empty where the store has the training run, or the model was trained without MLflow."""
        if self.training_run_id or not run.training_run_id:
            return ""
        return (
            f"warning: MLflow there does not have run {run.training_run_id}, which trained this model: the "
            "scoring run is not linked to it; MLFLOW_TRACKING_URI should be the store of training"
        )

    def tags(self, run: ScoringRun) -> dict[str, str]:
        tags = {
            **run.tags,
            "purebred.training_run_id": self.training_run_id or run.training_run_id,
            "purebred.model_id": self.model_id,
            "purebred.model_version": ", ".join(self.versions),
            CHECKPOINT_TAG: run.checkpoint_sha256,
        }
        return {key: value for key, value in tags.items() if value}


def recorded_run(folder: Path) -> Recorded:
    try:
        values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return Recorded(True, str(values["run_id"]), str(values.get("uri", "")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Recorded()


def run_of_model(model: str) -> Recorded:
    """Of the run directory in which the model is, RUN/export/model.onnx; of no other file."""
    file = Path(os.path.realpath(model))
    return recorded_run(file.parents[1]) if file.parent.name == "export" else Recorded()


def tracking_uri(model: str) -> str:
    """The store for a scoring run: MLFLOW_TRACKING_URI, or that of the model's training run.

    Raises:
        UserError: the training run's is not to be had here.
    """
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    uri = run_of_model(model).uri
    file = uri.removeprefix("sqlite:///")
    if ":***@" in uri or (file.startswith("/") and not Path(file).is_file()):
        raise UserError(
            f"--track: {uri}, the store of the run that trained this model, does not exist here or needs a "
            "password: set MLFLOW_TRACKING_URI"
        )
    return uri or DEFAULT_URI


def check_lineage(uri: str) -> None:
    """Before anything is scored.

    Raises:
        UserError: a scoring run cannot be logged there.
        OSError: the server does not answer now.
    """
    if is_server(uri):
        Server(uri).call("experiments/search", {"max_results": 1})
    elif not (LOCAL_LOGGER.is_file() and find_spec("mlflow")):
        raise UserError(
            f"--track: {redact(uri)} is a local store, which needs mlflow; set MLFLOW_TRACKING_URI to a "
            "server's http address"
        )


def log_scoring_run(uri: str, run: ScoringRun) -> str:
    """Returns the ID of the new MLflow run.

    Raises:
        UserError, OSError: the store refuses or does not answer; the message says what it said.
    """
    parameters = {key: redact(value) for key, value in run.parameters.items()}
    run = replace(run, name=redact(run.name), parameters=parameters)
    if is_server(uri):
        try:
            return Server(uri).log(run)
        except (KeyError, TypeError, AttributeError) as error:  # a field is not there, or of another kind
            raise UserError(f"MLflow at {redact(uri)} does not answer as MLflow does: {error!r}") from error
    done = subprocess.run(
        [sys.executable, str(LOCAL_LOGGER)],
        input=json.dumps(asdict(run)),
        capture_output=True,
        text=True,
        timeout=LOCAL_STORE_SECONDS,
        check=False,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri},
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(redact(f"{LOCAL_LOGGER.name} could not log to {uri}: {last[0]}"))
    for line in done.stderr.splitlines():
        if line.startswith("warning: MLflow"):
            print(redact(line), file=sys.stderr)
    return done.stdout.strip().splitlines()[-1]


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


class Server:
    """What we need of MLflow's REST API 2.0."""

    def __init__(self, uri: str):
        self.server = TrackingServer(uri)
        self.uri = self.server.uri

    def log(self, run: ScoringRun) -> str:
        source = self.find_source(run)
        named, numbered = (os.environ.get(f"MLFLOW_EXPERIMENT_{key}", "") for key in ("NAME", "ID"))
        experiment = "" if named else source.experiment_id or numbered
        experiment = experiment or self.find_experiment(named or DEFAULT_EXPERIMENT)
        if warning := source.warning(run):
            print(warning, file=sys.stderr)
        created = self.call(
            "runs/create",
            body={
                "experiment_id": experiment,
                "run_name": run.name,
                "start_time": run.started,
                "tags": _pairs(source.tags(run)),
            },
        )
        run_id: str = created["run"]["info"]["run_id"]
        metrics = [
            {"key": key, "value": value, "timestamp": run.ended, "step": 0}
            for key, value in run.metrics.items()
        ]
        body = {"run_id": run_id, "params": _pairs(run.parameters), "metrics": metrics}
        self.call("runs/log-batch", body=body)
        if source.model_id:
            self.call("runs/log-inputs", body={"run_id": run_id, "models": [{"model_id": source.model_id}]})
        self.call("runs/update", body={"run_id": run_id, "status": "FINISHED", "end_time": run.ended})
        return run_id

    def find_source(self, run: ScoringRun) -> Source:
        trained = None
        if run.training_run_id:
            trained = self.find("runs/get", {"run_id": run.training_run_id})
        found = trained["run"] if trained else self.find_by_checkpoint(run.checkpoint_sha256)
        if not found:
            return Source()
        training_run_id = found["info"]["run_id"]
        model_id = ""
        for output in found.get("outputs", {}).get("model_outputs", []):
            model = self.find(f"logged-models/{output['model_id']}", {}) or {"model": {"info": {}}}
            tags = {tag["key"]: tag["value"] for tag in model["model"]["info"].get("tags", [])}
            wanted = run.checkpoint_sha256, run.parameters.get("model_precision", "fp32")
            if (tags.get(CHECKPOINT_TAG), tags.get(PRECISION_TAG, "fp32")) == wanted:
                model_id = output["model_id"]
        search = {"filter": f"run_id = '{training_run_id}'"}
        versions = self.call("model-versions/search", search).get("model_versions", [])
        names = [
            f"{v['name']}/{v['version']}"
            for v in versions
            if model_id and v.get("source") == f"models:/{model_id}"
        ]
        return Source(training_run_id, found["info"]["experiment_id"], model_id, tuple(sorted(names)))

    def find_by_checkpoint(self, checkpoint_sha256: str) -> dict[str, Any]:
        """The run whose best checkpoint it is, if MLflow did not have the run at export; {}: none."""
        known = self.call("experiments/search", {"max_results": MAX_EXPERIMENTS})
        experiments = known.get("experiments", [])
        if not checkpoint_sha256 or not experiments:
            return {}
        body = {
            "experiment_ids": [experiment["experiment_id"] for experiment in experiments],
            "filter": f"tags.`{BEST_CHECKPOINT_TAG}` = '{checkpoint_sha256}'",
            "max_results": 1,
        }
        found: list[dict[str, Any]] = self.call("runs/search", body=body).get("runs", [])
        return found[0] if found else {}

    def find_experiment(self, name: str) -> str:
        found = self.find("experiments/get-by-name", {"experiment_name": name})
        if found is None:
            experiment_id: str = self.call("experiments/create", body={"name": name})["experiment_id"]
            return experiment_id
        return str(found["experiment"]["experiment_id"])

    def find(self, endpoint: str, query: dict[str, Any]) -> dict[str, Any] | None:
        """None: the server says that there is no such thing."""
        try:
            return self.call(endpoint, query)
        except _AbsentError:
            return None

    def call(
        self, endpoint: str, query: dict[str, Any] | None = None, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """GET, or POST when there is a body."""
        import http.client  # a tenth of the time to the first row, and most calls need none
        import urllib.error
        import urllib.parse

        path = f"/api/2.0/mlflow/{endpoint}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        try:
            with self.server.open(path, REQUEST_SECONDS, data) as answer:
                values = json.loads(answer.read(MAX_ANSWER_BYTES))
        except UntrustedError:
            raise
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            refused = f"MLflow at {self.uri} refused {endpoint} with {error.code}: {said}"
            if error.code >= 500:
                raise OSError(refused) from error
            raise (_AbsentError if error.code == 404 else UserError)(refused) from error
        except OSError as error:
            raise OSError(f"MLflow at {self.uri} does not answer: {error}") from error
        except (ValueError, http.client.HTTPException) as error:
            raise UserError(f"MLflow at {self.uri} does not answer as MLflow does: {error!r}") from error
        if not isinstance(values, dict):
            raise UserError(f"MLflow at {self.uri} does not answer as MLflow does: {values!r:.200}")
        return values


class _AbsentError(UserError):
    pass


def _pairs(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in values.items()]

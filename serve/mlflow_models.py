"""Models in MLflow by name: where a tracking server has their files, without mlflow.

models:/pets@champion    models:/pets/3    models:/pets/latest    models:/m-0123456789abcdef
runs:/RUN_ID/model       runs:/RUN_ID/export/model.onnx
"""

import os
import posixpath
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from serve import storage
from serve.contract.errors import UserError
from serve.contract.mlflow_tags import PRECISION_TAG
from serve.contract.urls import is_http, is_remote, redact
from serve.tracking_server import AbsentError, TrackingServer, way_to_a_server

DEFAULT_URI = "sqlite:///mlflow.db"
FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-ID or runs:/RUN_ID/model"
MODEL_FILE = "model.onnx"  # as MLflow's ONNX flavor names it
PROXY = "mlflow-artifacts:"  # files that the server reads from a store that clients cannot reach
_NAME = re.compile(r"(models|runs):/+")
_MODEL_ID = re.compile(r"m-[0-9a-f]+")


@dataclass(frozen=True)
class LoggedModel:
    """Files of a model in MLflow, and what it is called."""

    location: str
    """URI of its folder, or of one ONNX file."""
    version: str = ""
    """Registered one, as in pets/3; "" for a model that is named by its ID or run."""
    model_id: str = ""
    run_id: str = ""
    """The run that logged it."""

    @property
    def name(self) -> str:
        """Name that stays with these files when an alias moves."""
        return f"models:/{self.version or self.model_id}" if self.version or self.model_id else ""


def is_mlflow_model(name: str) -> bool:
    return bool(_NAME.match(name))


def model_server(name: str) -> TrackingServer:
    """Return the server that knows a model: MLFLOW_REGISTRY_URI for registered ones, or else
    MLFLOW_TRACKING_URI.

    Raises:
        UserError: that is no server.
    """
    registered = name.startswith("models:")
    uri = (registered and os.environ.get("MLFLOW_REGISTRY_URI")) or os.environ.get("MLFLOW_TRACKING_URI")
    uri = uri or DEFAULT_URI
    if not is_http(uri):
        raise UserError(
            f"{name}: {redact(uri)} is no tracking server, and mlflow alone reads a store without one. "
            f"{way_to_a_server(uri)}. Or give the run directory"
        )
    return TrackingServer(uri)


def find_model(server: TrackingServer, name: str) -> LoggedModel:
    """Return what a name stands for at this moment: an alias can move.

    Raises:
        UserError: the server does not have it, or the name is of no known form.
        OSError: the server does not answer.
    """
    try:
        return _find(server, name)
    except AbsentError as error:
        raise UserError(f"MLflow at {server.uri} does not have {name}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:  # a field is missing, or of another type
        raise server.unlike_mlflow(error) from error


def _find(server: TrackingServer, name: str) -> LoggedModel:
    kind, rest = name.partition(":")[0], _NAME.sub("", name).strip("/")
    if kind == "runs":
        run_id, _, path = rest.partition("/")
        if run_id and path:
            return _of_run(server, run_id, path)
    elif _MODEL_ID.fullmatch(rest):
        return _by_id(server, rest)
    elif found := re.fullmatch(r"([^/@]+)(?:@([^/@]+)|/([^/@]+))", rest):
        return _registered(server, *(unquote(part or "") for part in found.groups()))
    raise UserError(f"{name} names no model: give {FORMS}")


def _by_id(server: TrackingServer, model_id: str) -> LoggedModel:
    info = server.call(f"logged-models/{model_id}")["model"]["info"]
    return LoggedModel(info["artifact_uri"], model_id=model_id, run_id=info.get("source_run_id", ""))


def _registered(server: TrackingServer, model: str, alias: str, version: str) -> LoggedModel:
    try:
        registered = server.call("registered-models/get", {"name": model})["registered_model"]
    except AbsentError as error:
        raise UserError(f"MLflow at {server.uri} has no registered model {model!r}") from error
    aliases = {entry["alias"]: str(entry["version"]) for entry in registered.get("aliases", [])}
    newest = max((int(v["version"]) for v in registered.get("latest_versions", [])), default=0)
    number = aliases.get(alias, "") if alias else str(newest) if version == "latest" else version
    if not number.isdecimal() or number == "0":
        wanted = f"alias {alias!r}" if alias else f"version {version!r}"
        known = ", ".join(f"@{name} (version {of})" for name, of in sorted(aliases.items())) or "no alias"
        raise UserError(
            f"registered model {model!r} has no {wanted}: it has {known}, its newest version is {newest}"
        )
    try:
        found = server.call("model-versions/get", {"name": model, "version": number})["model_version"]
    except AbsentError as error:
        raise UserError(
            f"registered model {model!r} has no version {number}; its newest is {newest}"
        ) from error
    source = found["source"]
    logged = _find(server, source) if is_mlflow_model(source) else LoggedModel(source)
    return replace(logged, version=f"{model}/{number}", run_id=found.get("run_id") or logged.run_id)


def _of_run(server: TrackingServer, run_id: str, path: str) -> LoggedModel:
    run = server.call("runs/get", {"run_id": run_id})["run"]
    outputs = (run.get("outputs") or {}).get("model_outputs", [])
    logged = []
    for output in outputs:
        with suppress(AbsentError):  # somebody deleted it
            logged.append(server.call(f"logged-models/{output['model_id']}")["model"]["info"])
    named = [info for info in logged if info["name"] == path or _alias(info) == path]
    if named:  # exported again: the newest
        newest = max(named, key=lambda info: int(info.get("creation_timestamp_ms", 0)))
        return LoggedModel(newest["artifact_uri"], model_id=newest["model_id"], run_id=run_id)
    return LoggedModel(f"{run['info']['artifact_uri'].rstrip('/')}/{path}", run_id=run_id)


def _alias(info: dict[str, Any]) -> str:
    """Return the name of any run's model of this precision: model, model-int8, ..."""
    precision = next((tag["value"] for tag in info.get("tags", []) if tag["key"] == PRECISION_TAG), "")
    return "" if not precision else "model" if precision == "fp32" else f"model-{precision}"


def local_location(location: str) -> Path | None:
    """Return the path of artifacts on a disk, None for those elsewhere."""
    if location.startswith("file:"):
        return Path(unquote(urlsplit(location).path))
    return None if location.startswith(PROXY) or is_remote(location) else Path(location)


def model_files(server: TrackingServer, location: str) -> dict[str, str]:
    """Return the files in the folder of a model, name -> location; {} for a single file."""
    if not location.startswith(PROXY):
        return {file.name: file.url for file in storage.list_files(location) if file.url != location}
    folder = _proxied(server, location)
    listed = server.call("artifacts", {"path": folder}, service="mlflow-artifacts").get("files", [])
    names = [posixpath.basename(file["path"]) for file in listed if not file.get("is_dir")]
    return {name: f"{location.rstrip('/')}/{quote(name)}" for name in names}


def fetch_model_file(server: TrackingServer, location: str, path: Path) -> None:
    """Copy a file of a model to a local path, where it appears whole or not at all."""
    if location.startswith(PROXY):
        server.get_file(f"/api/2.0/mlflow-artifacts/artifacts/{quote(_proxied(server, location))}", path)
    else:
        storage.get_file(location, path)


def _proxied(server: TrackingServer, location: str) -> str:
    """Return the path below the server's own store. Raises UserError for that of another server, which gets
    no credentials of this one."""
    parts = urlsplit(location)
    host = urlsplit(server.uri).netloc
    if parts.netloc and parts.netloc.rpartition("@")[2] != host:
        raise UserError(
            f"{redact(location)} is of another server than {server.uri}: set MLFLOW_TRACKING_URI"
        )
    return unquote(parts.path).strip("/")


def onnx_file(names: Iterable[str], name: str) -> str:
    """Return which of a model's files is the ONNX file. Raises UserError when none is, or several are."""
    found = sorted(file for file in names if file.endswith(".onnx"))
    if MODEL_FILE in found:
        return MODEL_FILE
    if len(found) == 1:
        return found[0]
    raise UserError(
        f"{name} has {'several ONNX files: ' + ', '.join(found) if found else 'no ONNX file'}; a model is "
        "logged by export/main.py"
    )

"""MLflow's errors that may pass are not those that stay, and the latter come whole, with the way out."""

import errno
import os
import sqlite3
import ssl
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
import sqlalchemy.exc
from mlflow.exceptions import RestException
from mlflow.protos import databricks_pb2
from mlflow_store import REFUSES

from train.tracking.errors import RefusedError, translate


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, status: int):
        super().__init__(f"An error occurred ({status}) when calling the PutObject operation")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


class GoogleError(Exception):
    """As google.api_core's."""

    def __init__(self, code: int):
        super().__init__(f"{code} PUT https://storage.googleapis.com")
        self.code = code


def http(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} Error", response=response)


def rest(code: str, message: str = "no") -> RestException:
    return RestException({"error_code": code, "message": message})


def of_mlflow(message: str, code: str = "INTERNAL_ERROR", cause: Exception | None = None) -> Exception:
    error = mlflow.MlflowException(message, databricks_pb2.ErrorCode.Value(code))
    error.__cause__ = cause
    return error


def of_sqlite(text: str, folder: Path) -> Exception:
    """What a real statement raises on a database that cannot take it."""
    path = folder / "some.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as made:
        made.execute("create table t (x)")
        options = {"uri": True, "timeout": 0}
        with closing(sqlite3.connect(f"file:{path}?mode=ro", **options)) as other:  # type: ignore[call-overload]
            if text == "locked":
                made.execute("begin exclusive")
            if text == "garbage":
                (folder / "other.db").write_bytes(b"no database at all" * 100)
            name = f"file:{folder}/other.db" if text == "garbage" else f"file:{path}"
            reader = sqlite3.connect(name, **options) if text == "garbage" else other  # type: ignore[call-overload]
            try:
                reader.execute("select * from t" if text == "locked" else "insert into t values (1)")
            except sqlite3.Error as error:
                kind: Any = type(error).__name__
                wrapped = getattr(sqlalchemy.exc, kind)("insert", {}, error)
                return of_mlflow(str(wrapped), "TEMPORARILY_UNAVAILABLE", wrapped)
    raise AssertionError


def refused_connection() -> Exception:
    try:
        mlflow.MlflowClient(REFUSES).get_run("0" * 32)
    except Exception as error:
        return error
    raise AssertionError


def may_pass(error: Exception) -> bool:
    translated = translate(error, "http://server")
    assert isinstance(translated, (ConnectionError, RefusedError))
    assert "http://server" in str(translated)
    return isinstance(translated, ConnectionError)


def is_about_values(error: Exception) -> bool:
    translated = translate(error, "http://server")
    return isinstance(translated, RefusedError) and translated.about_values


PASSING = [
    ConnectionError("gone"),
    ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    TimeoutError("no answer"),
    requests.ConnectionError("Connection aborted."),
    requests.ReadTimeout("timed out"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    rest("TEMPORARILY_UNAVAILABLE"),
    rest("REQUEST_LIMIT_EXCEEDED"),
    rest("RESOURCE_EXHAUSTED"),
    *(http(status) for status in (408, 429, 500, 502, 503, 504)),
    ClientError(503),
    GoogleError(503),
    of_mlflow("API request to endpoint /api failed with error code 599 != 200. Response body: ''"),
]


def in_context(error: Exception, context: Exception) -> Exception:
    error.__context__ = context
    return error


STAYING = [
    in_context(
        of_mlflow("API request to https://server failed with exception certificate verify failed"),
        ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"),
    ),
    rest("PERMISSION_DENIED"),
    rest("UNAUTHENTICATED"),
    rest("RESOURCE_DOES_NOT_EXIST"),
    rest("INVALID_PARAMETER_VALUE"),
    rest("ENDPOINT_NOT_FOUND"),
    rest("403"),  # a proxy's
    RestException({"message": "Forbidden"}),
    *(http(status) for status in (400, 401, 403, 404, 405, 413)),
    of_mlflow("API request to endpoint /api failed with error code 405 != 200. Response body: '<html>'"),
    of_mlflow(
        "API request to endpoint was successful but the response body was not in a valid JSON format"
    ),
    of_mlflow("Detected out-of-date database schema (found version a, but expected b)."),
    of_mlflow("Cannot start run with ID 1 because it is in the deleted state."),
    ModuleNotFoundError("No module named 'boto3'", name="boto3"),
    PermissionError(errno.EACCES, "Permission denied", "/mlflow"),
    OSError(errno.EROFS, os.strerror(errno.EROFS), "/mlflow"),
    ClientError(403),
    GoogleError(404),
    ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"),
    requests.exceptions.MissingSchema("Invalid URL 'server:5000'"),
    Exception("'/mlruns' does not exist."),
    TypeError("a bug"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass(error: Exception) -> None:
    assert may_pass(error)


@pytest.mark.parametrize("error", STAYING, ids=repr)
def test_what_stays(error: Exception) -> None:
    assert not may_pass(error)


@pytest.mark.parametrize(("state", "passes"), [("locked", True), ("read only", False), ("garbage", False)])
def test_a_database_is_locked_for_a_while_and_read_only_for_good(
    tmp_path: Path, state: str, passes: bool
) -> None:
    assert may_pass(of_sqlite(state, tmp_path)) == passes


def test_a_refused_connection_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert may_pass(refused_connection())


def test_values_are_distinguished_from_the_rest() -> None:
    assert is_about_values(rest("INVALID_PARAMETER_VALUE"))
    assert is_about_values(http(413))
    assert not is_about_values(rest("PERMISSION_DENIED"))


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            ModuleNotFoundError("No module named 'google.cloud'", name="google.cloud"),
            ["google-cloud-storage"],
        ),
        (ModuleNotFoundError("No module named 'boto3'", name="boto3"), ["pip install boto3"]),
        (
            of_mlflow("Detected out-of-date database schema.\nTake a backup", "INTERNAL_ERROR"),
            ["Take a backup", "mlflow db upgrade postgresql://m:***@db/mlflow"],
        ),
        (rest("UNAUTHENTICATED"), ["MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_TOKEN"]),
        (rest("RESOURCE_DOES_NOT_EXIST", "No run"), ["No run", "MLFLOW_TRACKING_URI to http://before"]),
        (PermissionError(errno.EACCES, "Permission denied", "/mlflow"), ["'/mlflow'", "--serve-artifacts"]),
        (http(413), ["client_max_body_size"]),
        (http(405), ["https://"]),  # a redirect turns POST into GET
    ],
    ids=str,
)
def test_the_way_out_is_named(error: Exception, parts: list[str]) -> None:
    translated = translate(error, "postgresql://m:***@db/mlflow", "http://before")
    assert isinstance(translated, RefusedError)
    assert all(part in str(translated) for part in parts), translated


def test_a_password_in_an_error_is_hidden() -> None:
    error = ConnectionError("cannot connect to postgresql://u:p@ss@db:5432/m at all")
    assert "p@ss" not in str(translate(error, "http://server"))
    assert "postgresql://u:***@db:5432/m" in str(translate(error, "http://server"))

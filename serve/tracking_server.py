"""MLflow's REST API, with the credentials and TLS settings that MLflow's own client would use."""

import base64
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.contract.errors import UserError
from serve.contract.files import atomic_path
from serve.contract.urls import redact, split_credentials
from serve.storage import retried

if TYPE_CHECKING:  # a tenth of the time to the first row, and most calls need none
    import ssl

SERVER_CERTIFICATE = "MLFLOW_TRACKING_SERVER_CERT_PATH"
CLIENT_CERTIFICATE = "MLFLOW_TRACKING_CLIENT_CERT_PATH"
INSECURE = "MLFLOW_TRACKING_INSECURE_TLS"
REQUEST_SECONDS = 20.0
MAX_ANSWER_BYTES = 1 << 24
WAYS_OUT = {
    401: ": set MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN",
    405: ": give the https:// address, if the server redirects to it",
    403: ": start the server with --allowed-hosts that name this one, or take a user who may do this",
}


class UntrustedError(UserError):
    """The server's certificate is of an unknown authority."""


class AbsentError(UserError):
    """The server does not have the object."""


class TrackingServer:
    """A server's address, without the credentials in it, and how to reach it.

    Raises:
        UserError: its certificates cannot be read, or two settings contradict each other.
    """

    def __init__(self, uri: str):
        address, *from_uri = split_credentials(uri.strip())
        self.uri = address.rstrip("/")
        names, stored = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), _stored_credentials()
        user, password = (_setting(name) or stored.get(name.lower(), "") for name in names)
        token = _setting("MLFLOW_TRACKING_TOKEN")
        self.authorization = ""
        if any(from_uri):  # in the order of requests and MLflow
            self.authorization = _basic(*from_uri)
        elif user and password:
            self.authorization = _basic(user, password)
        elif token:
            self.authorization = f"Bearer {token}"
        self.tls = _tls() if self.uri.startswith("https://") else None

    def open(self, path: str, seconds: float, body: bytes | None = None) -> Any:
        """Return the answer to a GET, or to a POST of `body`; `path` begins with a slash.

        Raises:
            UntrustedError: the certificate is not trusted.
            OSError (HTTPError among them): the server refuses or does not answer.
        """
        import ssl
        import urllib.error
        import urllib.request

        request = urllib.request.Request(self.uri + path, body, {"Content-Type": "application/json"})
        if workspace := _setting("MLFLOW_WORKSPACE"):
            request.add_header("X-MLFLOW-WORKSPACE", workspace)
        if self.authorization:  # which no other host gets, wherever this one redirects to
            request.add_unredirected_header("Authorization", self.authorization)
        try:
            return urllib.request.urlopen(request, timeout=seconds, context=self.tls)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLCertVerificationError):
                raise
            raise UntrustedError(
                f"the certificate of MLflow at {self.uri} is not trusted ({error.reason.verify_message}): "
                f"set {SERVER_CERTIFICATE} to its authority's certificate"
            ) from error

    def get_file(self, path: str, target: Path) -> None:
        """Copy the answer to a GET into a file, which appears whole or not at all.

        Raises:
            UserError: the server does not have it. OSError: it does not answer, or with less than all.
        """
        import urllib.error

        def copy() -> None:
            with self.open(path, REQUEST_SECONDS) as answer, temporary.open("wb") as file:
                shutil.copyfileobj(answer, file)
                size = answer.headers["Content-Length"]
            if size not in (None, str(arrived := temporary.stat().st_size)):
                raise OSError(f"{arrived} bytes arrived of {size}")

        try:
            with atomic_path(target) as temporary:
                retried(self.uri + path, copy)
        except OSError as error:
            if isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code == 404:
                raise AbsentError(f"MLflow at {self.uri} does not have {path}") from error
            raise

    def call(
        self,
        endpoint: str,
        query: dict[str, Any] | None = None,
        body: dict[str, Any] | None = None,
        service: str = "mlflow",
    ) -> dict[str, Any]:
        """Return the answer of REST API 2.0 to a GET, or to a POST if there is a `body`.

        Raises:
            AbsentError: there is no such object.
            UserError: the server refuses the request, or is no MLflow.
            OSError: the server does not answer, or reports an error of its own.
        """
        import http.client
        import urllib.error
        import urllib.parse

        path = f"/api/2.0/{service}/{endpoint}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        try:
            with self.open(path, REQUEST_SECONDS, data) as answer:
                values = json.loads(answer.read(MAX_ANSWER_BYTES))
        except UntrustedError:
            raise
        except urllib.error.HTTPError as error:
            text = error.read(500).decode(errors="replace")
            way_out = WAYS_OUT.get(error.code, "")
            refusal = f"MLflow at {self.uri} refused {endpoint} with {error.code}: {text}{way_out}"
            if error.code >= 500:
                raise OSError(refusal) from error
            raise (AbsentError if error.code == 404 else UserError)(refusal) from error
        except OSError as error:
            raise OSError(f"MLflow at {self.uri} does not answer: {error}") from error
        except (ValueError, http.client.HTTPException) as error:
            raise self.unlike_mlflow(error) from error
        if not isinstance(values, dict):
            raise self.unlike_mlflow(values)
        return values

    def unlike_mlflow(self, found: object) -> UserError:
        """Return the error for an answer, or for what went wrong when it was read."""
        return UserError(
            f"{self.uri} does not answer like MLflow ({found!r:.200}): check MLFLOW_TRACKING_URI"
        )

    def check(self) -> None:
        """Raise what `call` raises if the server is not usable now. Unlike /health, this is answered to the
        hosts of its --allowed-hosts alone."""
        self.call("experiments/search", {"max_results": 1})


def way_to_a_server(uri: str) -> str:
    """Return what to do about a store that is none, as in a message."""
    if uri.startswith("databricks"):
        return "Set MLFLOW_TRACKING_URI to the workspace's https://... and MLFLOW_TRACKING_TOKEN"
    return (
        "Set MLFLOW_TRACKING_URI=http://HOST:PORT to a server; "
        f"`mlflow server --backend-store-uri {redact(uri)}` starts one on this store"
    )


def _setting(name: str) -> str:
    return os.environ.get(name, "").strip()  # of a file's line end, http.client's error would show it all


def _stored_credentials() -> Mapping[str, str]:
    """Return the variables, in lower case, of MLflow's own file. Raises UserError if it is no such file."""
    import configparser

    file, parser = os.path.expanduser("~/.mlflow/credentials"), configparser.ConfigParser()
    try:
        parser.read(file)
        return dict(parser["mlflow"]) if "mlflow" in parser else {}
    except (configparser.Error, ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read as MLflow's credentials: {type(error).__name__}") from error


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _tls() -> "ssl.SSLContext":
    import ssl

    insecure = _setting(INSECURE).lower() in ("true", "1")
    authority = _setting(SERVER_CERTIFICATE)
    if insecure and authority:
        raise UserError(f"{INSECURE} and {SERVER_CERTIFICATE} are both set: unset one of them")
    variable = SERVER_CERTIFICATE
    try:
        # as requests, by which MLflow's client reaches its server
        authority = authority or _setting("REQUESTS_CA_BUNDLE") or _setting("CURL_CA_BUNDLE")
        is_folder = os.path.isdir(authority)
        context = ssl.create_default_context(
            cafile=None if is_folder else authority or None, capath=authority if is_folder else None
        )
        variable = CLIENT_CERTIFICATE
        if certificate := _setting(CLIENT_CERTIFICATE):
            context.load_cert_chain(certificate)
    except OSError as error:  # ssl's own errors too
        raise UserError(f"{variable}: the file cannot be read as PEM certificates: {error}") from error
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context

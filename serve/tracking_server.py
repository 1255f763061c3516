"""Requests to an MLflow server with the credentials and TLS settings that MLflow's own client would use."""

import base64
import os
from typing import TYPE_CHECKING, Any

from serve.contract.errors import UserError
from serve.contract.urls import split_credentials

if TYPE_CHECKING:  # a tenth of the time to the first row, and most calls need none
    import ssl

SERVER_CERTIFICATE, CLIENT_CERTIFICATE = (
    f"MLFLOW_TRACKING_{side}_CERT_PATH" for side in ("SERVER", "CLIENT")
)
INSECURE = "MLFLOW_TRACKING_INSECURE_TLS"


class UntrustedError(UserError):
    """The server's certificate is not of an authority that we know."""


class TrackingServer:
    """A server's address, without the credentials in it, and how to reach it.

    Raises:
        UserError: its certificates cannot be read, or two settings contradict each other.
    """

    def __init__(self, uri: str):
        address, *from_uri = split_credentials(uri)
        self.uri = address.rstrip("/")
        user, password = (_setting(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
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
        """The answer to a GET, or to a POST of `body`; `path` begins with a slash.

        Raises:
            UntrustedError: its certificate is not. OSError (HTTPError among them): it refuses or does
                not answer.
        """
        import ssl
        import urllib.error
        import urllib.request

        request = urllib.request.Request(self.uri + path, body, {"Content-Type": "application/json"})
        if self.authorization:  # which no other host gets, wherever this one redirects to
            request.add_unredirected_header("Authorization", self.authorization)
        try:
            return urllib.request.urlopen(request, timeout=seconds, context=self.tls)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLCertVerificationError):
                raise
            raise UntrustedError(
                f"the certificate of MLflow at {self.uri} is not trusted ({error.reason.verify_message}): "
                f"give its authority's by {SERVER_CERTIFICATE}"
            ) from error


def _setting(name: str) -> str:
    return os.environ.get(name, "").strip()  # of a file's line end, http.client's error would show it all


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

"""Serving reaches an MLflow server by the settings that MLflow's own client has."""

import base64
import datetime
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from serve import doctor
from serve.tracking_server import TrackingServer, UntrustedError


class Recorder(BaseHTTPRequestHandler):
    """Notes who asked; /redirect leads to the same server by another name."""

    asked: ClassVar[list[str | None]] = []
    workspaces: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.asked.append(self.headers["Authorization"])
        self.workspaces.append(self.headers["X-MLFLOW-WORKSPACE"])
        self.send_response(302 if self.path == "/redirect" else 200)
        if self.path == "/redirect":
            assert isinstance(self.server, ThreadingHTTPServer)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None: ...


@contextmanager
def recorder(context: ssl.SSLContext | None = None) -> Iterator[int]:
    Recorder.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of localhost, signed by itself."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(private + signed.public_bytes(pem))
    return path


def basic(pair: str) -> str:
    return "Basic " + base64.b64encode(pair.encode()).decode()


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD", "TOKEN", "INSECURE_TLS", "SERVER_CERT_PATH", "CLIENT_CERT_PATH"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@pytest.mark.parametrize(
    ("environment", "user", "expected"),
    [
        ({}, "", None),
        ({"TOKEN": "abc\n"}, "", "Bearer abc"),
        ({"TOKEN": "abc", "USERNAME": "u", "PASSWORD": "p"}, "", basic("u:p")),
        ({"TOKEN": "abc"}, "u:p%40ss@", basic("u:p@ss")),
    ],
)
def test_the_server_gets_the_credentials_of_the_environment_or_the_address(
    environment: dict[str, str], user: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    with recorder() as port:
        uri = f"http://{user}127.0.0.1:{port}"
        TrackingServer(uri).check()
        finding = doctor.mlflow_server(uri, 0)
        assert set(Recorder.asked) == {expected}
    assert finding.level == "ok"
    assert "p%40ss" not in str(finding)


def test_credentials_may_be_in_mlflows_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".mlflow").mkdir()
    file = tmp_path / ".mlflow" / "credentials"
    file.write_text("[mlflow]\nmlflow_tracking_username = u\nmlflow_tracking_password = p\n")
    with recorder() as port:
        TrackingServer(f"http://127.0.0.1:{port}").check()
    assert Recorder.asked == [basic("u:p")]
    file.write_text("u:p\n")
    with pytest.raises(ValueError, match="credentials"):
        TrackingServer("http://127.0.0.1:9")


def test_the_server_is_asked_for_the_workspace_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team-a\n")
    with recorder() as port:
        TrackingServer(f"http://127.0.0.1:{port}/\n").check()
    assert Recorder.workspaces[-1] == "team-a"


def test_another_host_does_not_get_the_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc")
    with recorder() as port:
        TrackingServer(f"http://127.0.0.1:{port}").open("/redirect", 5).close()
    assert Recorder.asked == ["Bearer abc", None]


def test_tls_is_checked_as_the_environment_says(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with recorder(context) as port:
        uri = f"https://localhost:{port}"
        with pytest.raises(UntrustedError, match="MLFLOW_TRACKING_SERVER_CERT_PATH"):
            TrackingServer(uri).check()
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
        TrackingServer(uri).check()
        monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
        with pytest.raises(ValueError, match="MLFLOW_TRACKING_INSECURE_TLS"):
            TrackingServer(uri).check()
        monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
        TrackingServer(uri).check()


def test_a_client_certificate_is_shown_to_the_server(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.load_verify_locations(certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
    with recorder(context) as port:
        uri = f"https://localhost:{port}"
        with pytest.raises(OSError, match=uri):
            TrackingServer(uri).check()
        monkeypatch.setenv("MLFLOW_TRACKING_CLIENT_CERT_PATH", str(certificate))
        TrackingServer(uri).check()


@pytest.mark.parametrize("side", ["SERVER", "CLIENT"])
def test_a_certificate_that_cannot_be_read_is_named(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MLFLOW_TRACKING_{side}_CERT_PATH", "/nowhere.pem")
    with pytest.raises(ValueError, match=f"MLFLOW_TRACKING_{side}_CERT_PATH"):
        TrackingServer("https://localhost")

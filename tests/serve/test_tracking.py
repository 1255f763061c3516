"""A scoring run in MLflow points to the model it used and to the run that trained it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest
from conftest import TrainedRun

import export.main
import serve.main
from serve.contract.mlflow_tags import EXPERIMENT_TAGS
from serve.tracking import ScoringRun, find_server, log_scoring_run
from serve.tracking_server import TrackingServer

MLFLOW = Path(sys.executable).with_name("mlflow")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(*command: object, health: str, cwd: Path) -> subprocess.Popen[bytes]:
    """A server in a process group of its own, once it answers."""
    log = (cwd / "server.log").open("wb")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # mlflow starts uvicorn by name
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        stdout=log,
        stderr=log,
        start_new_session=True,
        env={**os.environ, "PATH": path},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(health, timeout=2)
        except OSError:
            time.sleep(0.2)
        else:
            return process
    stop(process)
    raise AssertionError((cwd / "server.log").read_text())


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def server(published: Path) -> Iterator[str]:
    """An MLflow tracking server on the store of `published`."""
    uri = f"http://127.0.0.1:{free_port()}"
    store = os.environ["MLFLOW_TRACKING_URI"]
    process = start(
        *(MLFLOW, "server", "--backend-store-uri", store, "--port", uri.rpartition(":")[2], "--workers", 1),
        health=f"{uri}/health",
        cwd=published.parent,
    )
    yield uri
    stop(process)


def score(run: Path, trained: TrainedRun, *more: str) -> int:
    images = str(trained.sample / "test")
    model = str(run / "export" / "model.onnx")
    return serve.main.main(["--model", model, "--images", images, "--output", "p.csv", "--track", *more])


def test_a_scoring_run_is_linked_to_the_model_and_its_training_run(
    published: Path,
    trained: TrainedRun,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export.main.main(["--run", str(published), "--register", "pets"]) == 0
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("pets", "challenger")
    training = client.get_run(version.run_id).info
    capsys.readouterr()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert score(published, trained) == 0
    scoring = f"tags.`purebred.kind` = 'scoring' and tags.`purebred.training_run_id` = '{version.run_id}'"
    (found,) = client.search_runs([training.experiment_id], scoring)
    scored = client.get_run(found.info.run_id)  # a search leaves inputs out
    assert scored.info.run_id in capsys.readouterr().out
    assert scored.info.status == "FINISHED"
    assert scored.data.tags["mlflow.parentRunId"] == version.run_id
    assert scored.data.tags["purebred.data"] == "test"
    assert scored.info.run_name == f"score {training.run_name}"
    assert scored.info.end_time > scored.info.start_time
    assert scored.data.tags["purebred.model_version"] == "pets/1"
    assert [f"models:/{model.model_id}" for model in scored.inputs.model_inputs] == [version.source]
    assert scored.data.metrics["rows"] == 20
    assert sum(json.loads(scored.data.tags["purebred.predicted"]).values()) == 20
    assert scored.data.metrics["error_share"] == 0
    assert scored.data.params["provider"] == "cpu"
    images, model_id = str(trained.sample / "test"), version.source.removeprefix("models:/")
    expected = Path("p.csv").read_bytes()
    of_run = f"runs:/{version.run_id}/model"
    for name in ("models:/pets@challenger", "models:/pets/latest", version.source, of_run):
        assert serve.main.main(["--model", name, "--images", images, "--output", "p.csv", "--track"]) == 0
        assert Path("p.csv").read_bytes() == expected
        printed = capsys.readouterr()
        resolved = "models:/pets/1" if "pets" in name else f"models:/{model_id}"
        assert resolved in printed.err
        newest = client.get_run(printed.out.split("scoring run ")[1].strip())
        assert newest.data.params["model"] == resolved
        assert newest.data.tags["purebred.model_version"] == "pets/1"


def test_a_local_store_costs_a_warning_with_the_way_out_and_no_scores(
    published: Path, trained: TrainedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    store = os.environ["MLFLOW_TRACKING_URI"]
    assert score(published, trained) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "--track" in line]
    assert warning.startswith("warning: ")
    assert "MLFLOW_TRACKING_URI=http://" in warning
    assert f"mlflow server --backend-store-uri {store}" in warning
    assert len(Path("p.csv").read_text().splitlines()) == 21


def test_a_server_that_is_away_is_an_error_before_scoring_and_a_warning_after(
    published: Path,
    trained: TrainedRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert score(published, trained) == 3
    assert uri in capsys.readouterr().err
    assert not Path("p.csv").exists()
    monkeypatch.setattr(TrackingServer, "check", lambda server: None)
    assert score(published, trained) == 0
    assert f"MLflow at {uri}" in capsys.readouterr().err
    assert len(Path("p.csv").read_text().splitlines()) == 21


@pytest.mark.parametrize("answer", [b"{}", b"[]", b"SSH-2.0-OpenSSH", b"not JSON"])
def test_a_server_that_is_no_mlflow_costs_no_scores(
    published: Path,
    trained: TrainedRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: bytes,
) -> None:
    class Nonsense(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if answer.startswith(b"SSH"):
                self.wfile.write(answer + b"\r\n")
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Nonsense) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(TrackingServer, "check", lambda server: None)
        assert score(published, trained) == 0
        server.shutdown()
    assert "warning: " in capsys.readouterr().err


@pytest.mark.parametrize(("code", "kind"), [(503, OSError), (403, ValueError)])
def test_a_server_that_is_out_of_order_may_be_asked_again_and_one_that_refuses_not(
    code: int, kind: type[Exception]
) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(code)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(kind, match=f"experiments/search.*{code}"):
            TrackingServer(f"http://127.0.0.1:{server.server_port}").check()
        server.shutdown()


REFUSED = {"error_code": "INVALID_PARAMETER_VALUE"}


@contextmanager
def answering(answers: dict[str, Any]) -> Iterator[tuple[TrackingServer, list[tuple[str, str]]]]:
    """A server that answers endpoints by their beginning, 404 to all others, 400 with REFUSED; the requests
    it got."""
    requests: list[tuple[str, str]] = []

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            endpoint = self.path.partition("mlflow/")[2]
            requests.append((endpoint, self.rfile.read(size).decode()))
            answer = next((value for path, value in answers.items() if endpoint.startswith(path)), None)
            if isinstance(answer, list):  # one after the other
                answer = answer.pop(0)
            self.send_response(404 if answer is None else 400 if answer == REFUSED else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer or {}).encode())

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield TrackingServer(f"http://127.0.0.1:{server.server_port}"), requests
        server.shutdown()


LOGGING: dict[str, Any] = {
    "runs/create": {"run": {"info": {"run_id": "scored"}}},
    "runs/log-batch": {},
    "runs/update": {},
}


@pytest.mark.parametrize(("trained_by", "warned"), [("0" * 32, True), ("", False)])
def test_a_model_of_an_unknown_run_is_tracked_without_a_source(
    trained_by: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"experiments/search": {}, "experiments/create": {"experiment_id": "7"}}
    scored = ScoringRun("score x", trained_by, "abc", {"a": "b"}, {"rows": 3.0}, {}, 1000, 2000)
    with answering(LOGGING | known) as (server, requests):
        assert log_scoring_run(server, scored) == "scored"
    bodies = {path: json.loads(body) for path, body in requests if body}
    created, logged = bodies["runs/create"], bodies["runs/log-batch"]
    tags = [{"key": key, "value": value} for key, value in EXPERIMENT_TAGS.items()]
    assert bodies["experiments/create"] == {"name": "purebred", "tags": tags}
    assert (created["experiment_id"], created["start_time"]) == ("7", 1000)
    assert {"key": "purebred.checkpoint_sha256", "value": "abc"} in created["tags"]
    assert logged["params"] == [{"key": "a", "value": "b"}]
    assert logged["metrics"] == [{"key": "rows", "value": 3.0, "timestamp": 2000, "step": 0}]
    assert bodies["runs/update"] == {"run_id": "scored", "status": "FINISHED", "end_time": 2000}
    assert "runs/log-inputs" not in bodies
    assert ("MLFLOW_TRACKING_URI" in capsys.readouterr().err) == warned


SCORED = ScoringRun("score x", "", "abc", {"a": "b"}, {"rows": 3.0}, {}, 1000, 2000)


def test_an_experiment_that_another_process_has_made_meanwhile_is_taken() -> None:
    found = {"experiment": {"experiment_id": "9", "lifecycle_stage": "active"}}
    known = {"experiments/get-by-name": [None, found], "experiments/create": REFUSED}
    with answering(LOGGING | known) as (server, requests):
        assert log_scoring_run(server, SCORED) == "scored"
    (created,) = [json.loads(body) for path, body in requests if path == "runs/create"]
    assert created["experiment_id"] == "9"


def test_an_experiment_in_the_trash_is_named_with_the_way_back() -> None:
    found = {"experiment": {"experiment_id": "9", "lifecycle_stage": "deleted"}}
    with (
        answering(LOGGING | {"experiments/get-by-name": found}) as (server, requests),
        pytest.raises(ValueError, match="--experiment-id 9"),
    ):
        log_scoring_run(server, SCORED)
    assert "runs/create" not in [path for path, _ in requests]


def test_a_scoring_run_whose_numbers_are_refused_has_failed() -> None:
    known = {"experiments/create": {"experiment_id": "7"}, "runs/log-batch": REFUSED}
    with (
        answering(LOGGING | known) as (server, requests),
        pytest.raises(ValueError, match="log-batch"),
    ):
        log_scoring_run(server, SCORED)
    (ended,) = [json.loads(body) for path, body in requests if path == "runs/update"]
    assert ended == {"run_id": "scored", "status": "FAILED", "end_time": 2000}


def test_the_server_of_a_model_in_its_run_directory_is_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    model = tmp_path / "run" / "export" / "model.onnx"
    model.parent.mkdir(parents=True)
    model.touch()
    assert find_server(str(model)) is None
    assert "sqlite:///mlflow.db" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    assert find_server(str(model)) is None
    assert "mlflow server" not in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    record = tmp_path / "run" / "tracking.json"
    (tmp_path / "link.onnx").symlink_to(model)
    with answering({"experiments/search": {}}) as (server, _):
        record.write_text(json.dumps({"run_id": "1", "uri": server.uri}))
        for name in (model, tmp_path / "link.onnx"):
            found = find_server(str(name))
            assert found is not None
            assert found.uri == server.uri
        record.write_text(json.dumps({"run_id": "1", "uri": "http://me:***@server"}))
        with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
            find_server(str(model))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        assert find_server(str(model)) is not None

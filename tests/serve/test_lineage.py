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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from conftest import TrainedRun
from mlflow.entities import Run

import export.main
import serve.main
from serve import lineage
from serve.lineage import ScoringRun, check_lineage, log_scoring_run, tracking_uri
from serve.predictor import Predictor

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


def scoring_runs() -> list[Run]:
    experiment = mlflow.get_experiment_by_name("purebred")
    assert experiment is not None
    client = mlflow.MlflowClient()
    found = client.search_runs(
        [experiment.experiment_id], "tags.`purebred.kind` = 'scoring'", order_by=["start_time"]
    )
    return [client.get_run(run.info.run_id) for run in found]  # a search leaves inputs out


def test_a_local_store_and_a_server_are_told_the_same(
    published: Path,
    trained: TrainedRun,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export.main.main(["--run", str(published), "--register", "pets"]) == 0
    version = mlflow.MlflowClient().get_model_version_by_alias("pets", "challenger")
    store = os.environ["MLFLOW_TRACKING_URI"]
    capsys.readouterr()
    for uri in (store, server):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert score(published, trained) == 0
    printed = capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    first, second = scoring_runs()
    assert f"scoring run {first.info.run_id}" in printed
    assert f"scoring run {second.info.run_id}" in printed
    for scored in (first, second):
        assert scored.info.status == "FINISHED"
        assert scored.info.run_name == f"score {mlflow.get_run(version.run_id).info.run_name}"
        assert scored.info.end_time > scored.info.start_time
        assert scored.data.tags["purebred.training_run_id"] == version.run_id
        assert scored.data.tags["purebred.model_version"] == "pets/1"
        assert [f"models:/{model.model_id}" for model in scored.inputs.model_inputs] == [version.source]
        assert scored.data.metrics["rows"] == 20
        assert scored.data.params["provider"] == "cpu"
    assert first.data.params == second.data.params
    assert first.data.metrics.keys() == second.data.metrics.keys()
    own = lambda tags: {k: v for k, v in tags.items() if k.startswith("purebred.")}  # noqa: E731
    assert own(first.data.tags) == own(second.data.tags)
    assert first.info.experiment_id == mlflow.get_run(version.run_id).info.experiment_id


def test_a_model_of_an_unknown_run_is_tracked_without_a_source(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/other.db"
    scored = ScoringRun("score x", "0" * 32, "abc", {"a": "b"}, {"rows": 3.0}, {}, 1000, 2000)
    logged = mlflow.MlflowClient(uri).get_run(log_scoring_run(uri, scored))
    assert logged.data.metrics == {"rows": 3.0}
    assert logged.data.tags["purebred.checkpoint_sha256"] == "abc"
    assert (logged.info.start_time, logged.info.end_time) == (1000, 2000)
    assert not logged.inputs.model_inputs


def test_a_local_store_without_mlflow_is_an_error_before_anything_is_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_lineage("sqlite:///mlflow.db")
    monkeypatch.setattr(lineage, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="is a local store, which needs mlflow"):
        check_lineage("sqlite:///mlflow.db")


def test_a_server_that_is_away_is_an_error_before_scoring_and_a_warning_after(
    published: Path,
    trained: TrainedRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(OSError, match=f"MLflow at {uri} does not answer"):
        check_lineage(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert score(published, trained) == 3
    assert not Path("p.csv").exists()
    monkeypatch.setattr(serve.main, "check_lineage", lambda uri: None)
    assert score(published, trained) == 0
    assert "warning: the scoring run is not in MLflow" in capsys.readouterr().err
    assert len(Path("p.csv").read_text().splitlines()) == 21


@pytest.mark.slow
def test_mlflow_serves_the_same_probabilities_over_http(published: Path) -> None:
    assert export.main.main(["--run", str(published), "--register", "pets"]) == 0
    port = free_port()
    process = start(
        *(MLFLOW, "models", "serve", "-m", "models:/pets@challenger", "--env-manager", "local", "-p", port),
        health=f"http://127.0.0.1:{port}/ping",
        cwd=published.parent,
    )
    try:
        pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": pixels.tolist()}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            predictions = json.load(answer)["predictions"]
    finally:
        stop(process)
    expected = Predictor(published / "export" / "model.onnx", "cpu").predict(pixels)
    np.testing.assert_allclose(np.float32(predictions["probabilities"]), expected, rtol=0, atol=1e-7)


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
        monkeypatch.setattr(serve.main, "check_lineage", lambda uri: None)
        assert score(published, trained) == 0
        server.shutdown()
    assert "warning: the scoring run is not in MLflow: MLflow at" in capsys.readouterr().err


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
        with pytest.raises(kind, match=f"refused experiments/search with {code}"):
            check_lineage(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_a_model_that_was_exported_before_mlflow_had_its_run_is_found_by_its_checkpoint() -> None:
    asked: list[Any] = []

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            asked.append((self.path.partition("mlflow/")[2], self.rfile.read(size).decode()))
            answers = {
                "experiments/search": {"experiments": [{"experiment_id": "1"}, {"experiment_id": "2"}]},
                "runs/search": {"runs": [{"info": {"run_id": "trained", "experiment_id": "2"}}]},
                "model-versions/search": {},
                "runs/create": {"run": {"info": {"run_id": "scored"}}},
            }
            self.send_response(200)
            self.end_headers()
            known = next((value for path, value in answers.items() if asked[-1][0].startswith(path)), {})
            self.wfile.write(json.dumps(known).encode())

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    scored = ScoringRun("score x", "", "abc", {}, {"rows": 3.0}, {}, 1000, 2000)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        assert log_scoring_run(f"http://127.0.0.1:{server.server_port}", scored) == "scored"
        server.shutdown()
    bodies = {path: json.loads(body) for path, body in asked if body}
    assert bodies["runs/search"]["experiment_ids"] == ["1", "2"]
    assert "= 'abc'" in bodies["runs/search"]["filter"]
    assert bodies["runs/create"]["experiment_id"] == "2"
    assert {"key": "purebred.training_run_id", "value": "trained"} in bodies["runs/create"]["tags"]


def test_the_store_of_a_model_in_its_run_directory_is_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    model = tmp_path / "run" / "export" / "model.onnx"
    model.parent.mkdir(parents=True)
    model.touch()
    assert tracking_uri(str(model)) == "sqlite:///mlflow.db"
    store, record = tmp_path / "mlflow.db", {"run_id": "1", "uri": f"sqlite:///{tmp_path}/mlflow.db"}
    (tmp_path / "run" / "tracking.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="does not exist here"):
        tracking_uri(str(model))
    store.touch()
    (tmp_path / "link.onnx").symlink_to(model)
    for name in (model, tmp_path / "link.onnx"):
        assert tracking_uri(str(name)) == record["uri"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://given")
    assert tracking_uri(str(model)) == "http://given"

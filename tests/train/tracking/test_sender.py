"""What MLflow refuses is named whole and sent no more, and all else is in the run, which ends."""

import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow_store import DIGEST, METRICS, PARAMETERS, history, runs, tracker, use, whole_run

from train import sync

pytestmark = pytest.mark.usefixtures("store")


class Refusing(BaseHTTPRequestHandler):
    """A tracking server, or what is before it, that gives one answer to everything."""

    answer: tuple[int, str] = (403, "")
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        status, text = self.answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None: ...


@contextmanager
def refusing(status: int, text: str) -> Iterator[tuple[str, type[Refusing]]]:
    handler = type("Handler", (Refusing,), {"answer": (status, text), "asked": 0})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "text", "way_out"),
    [
        (401, "You are not authenticated.\nSee the documentation.", "MLFLOW_TRACKING_USERNAME"),
        (403, '{"message": "Invalid Host header\\nsee --allowed-hosts"}', "see --allowed-hosts"),
        (403, '{"error_code": "PERMISSION_DENIED", "message": "no"}', "MLFLOW_TRACKING_TOKEN"),
        (404, "<html>nothing here</html>", "must be the address of an MLflow server"),
        (200, "<html>please log in</html>", "must be the address of an MLflow server"),
    ],
)
def test_a_server_that_refuses_is_asked_once_and_named_whole(
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
    text: str,
    way_out: str,
) -> None:
    with refusing(status, text) as (uri, handler):
        use(monkeypatch, uri)
        t = tracker()
        t.start(PARAMETERS, ("data/train", DIGEST))
        asked = handler.asked
        t.log_metrics(1, METRICS[0])
        t.send()
        t.end("FINISHED")
        assert handler.asked == asked <= 2
    printed = capsys.readouterr().out
    assert way_out in printed
    assert "does not answer" not in printed
    assert f"python train/sync.py {Path()}" in printed
    use(monkeypatch, store)
    assert sync.main(["."]) == 0
    assert history(store, runs(store)[0].info.run_id, "val/accuracy") == [(1, 0.5)]


def test_an_artifact_store_without_its_client_library_leaves_no_run_running(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def missing(client: Any, run_id: str, path: str) -> None:
        asked.append((Path(path).name, runs(store)[0].info.status))
        raise ModuleNotFoundError("No module named 'boto3'", name="boto3")

    for name in ("config.yaml", "best.pt"):
        Path(name).write_text(name)
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_artifact", missing)
        t = tracker()
        t.start(PARAMETERS, ("data/train", DIGEST))
        t.log_metrics(1, METRICS[0])
        t.record.status = "FINISHED"
        t.log_files([Path("config.yaml"), Path("best.pt")])
        t.end("FINISHED")
        assert asked == [("config.yaml", "FINISHED"), ("best.pt", "FINISHED")]
        assert sync.main(["."]) == 2
    (run,) = runs(store)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/accuracy"] == 0.5
    for text in capsys.readouterr():
        assert "(config.yaml and 1 more)" in text
        assert "pip install boto3" in text
    assert sync.main(["."]) == 0
    assert [f.path for f in mlflow.MlflowClient(store).list_artifacts(t.run_id)] == [
        "best.pt",
        "config.yaml",
    ]
    assert [run.info.status for run in runs(store)] == ["FINISHED"]


def test_one_value_that_mlflow_refuses_costs_no_other(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a server that is older than the client does."""
    log_batch, calls = mlflow.MlflowClient.log_batch, []

    def older(self: Any, run_id: str, metrics: Any = (), params: Any = (), **options: Any) -> None:
        calls.append(len(metrics))
        if any(item.key in ("lr", "f1/b", "best/f1/b") for item in [*metrics, *params]):
            raise mlflow.MlflowException.invalid_parameter_value("too long\nby 3 characters")
        log_batch(self, run_id, metrics, params, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", older)
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST))
    for epoch in (1, 2):
        t.log_metrics(epoch, {"f1/a": 0.1, "f1/b": 0.2, "val/accuracy": epoch / 10})
        t.log_best(epoch, {"f1/b": 0.2, "val/accuracy": epoch / 10})
    t.end("FINISHED")
    (run,) = runs(store)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"model": "simple_cnn", "dropout": "None"}
    assert history(store, t.run_id, "val/accuracy") == [(1, 0.1), (2, 0.2)]
    assert history(store, t.run_id, "f1/a") == [(1, 0.1), (2, 0.1)]
    assert run.data.metrics["best/val/accuracy"] == 0.2
    printed = capsys.readouterr().out
    assert re.search(r"parameters .*\(lr\).* too long by 3 characters", printed)
    assert re.search(r"metrics .*\(f1/b", printed)


def test_a_database_of_another_mlflow_is_named_with_the_command(
    store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite3.connect("mlflow.db", isolation_level=None)) as database:
        database.execute("update alembic_version set version_num = 'fedcba987654'")
    whole_run()
    printed = capsys.readouterr().out
    assert "fedcba987654" in printed
    assert f"mlflow db upgrade {store}" in printed
    assert "does not answer" not in printed


def test_a_value_that_is_refused_is_found_in_few_requests(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_batch, calls = mlflow.MlflowClient.log_batch, []

    def refusing(self: Any, run_id: str, metrics: Any = (), params: Any = (), **options: Any) -> None:
        calls.append(len(metrics))
        if any(item.key == "f1/77" for item in metrics):
            raise mlflow.MlflowException.invalid_parameter_value("too long")
        log_batch(self, run_id, metrics, params, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", refusing)
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST))
    t.log_metrics(1, {f"f1/{label}": 0.5 for label in range(128)})
    t.end("FINISHED")
    assert len(runs(store)[0].data.metrics) == 127
    assert len(calls) < 30


def test_an_unexpected_error_does_not_end_the_thread(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST))
    update, left = t.sender.update, [KeyError("answer")]

    def fails_once() -> None:
        if left:
            raise left.pop()
        update()

    monkeypatch.setattr(t.sender, "update", fails_once)
    t.log_metrics(1, METRICS[0])
    t.end("FINISHED")
    assert "warning: 'answer'" in capsys.readouterr().out
    assert runs(store)[0].info.status == "FINISHED"
    assert history(store, t.run_id, "val/accuracy") == [(1, 0.5)]


def test_a_note_is_sent_at_the_end_unless_somebody_wrote_another(store: str) -> None:
    def ended(run_id: str, note: str) -> str:
        t = tracker(0, run_id)
        t.start(PARAMETERS, ("data/train", DIGEST))
        t.log_note(note)
        t.end("FINISHED")
        return str(runs(store)[0].data.tags.get("mlflow.note.content"))

    assert ended("", "first") == "first"
    run_id = runs(store)[0].info.run_id
    assert ended(run_id, "second") == "second"
    mlflow.MlflowClient(store).set_tag(run_id, "mlflow.note.content", "mine")
    assert ended(run_id, "third") == "mine"

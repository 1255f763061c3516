"""MLflow has exactly one truthful run, and training neither waits for it nor loses a number to it."""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Run

from train import registry, sync, tracking
from train.config import TrainConfig
from train.metrics_file import read_metrics
from train.tracking import MlflowTracker, metric_name, read_record

DIGEST = "0123456789abcdef" * 4
PARAMETERS: dict[str, Any] = {"lr": 0.1, "model": "simple_cnn", "dropout": None}
REFUSES = "http://127.0.0.1:9"
METRICS = [{"train/loss": 0.9, "val/accuracy": 0.5}, {"train/loss": 0.4, "val/accuracy": 0.75}]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new SQLite store takes seconds to make: once."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)  # the default store and its artifacts are in the working directory
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setattr(tracking, "SYSTEM_METRICS_SECONDS", 60)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.2)
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    use(monkeypatch, uri)
    yield uri
    mlflow.end_run()
    mlflow.set_tracking_uri(None)


def use(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)


def tracker(epochs_done: int = 0, run_id: str = "") -> MlflowTracker:
    return MlflowTracker(TrainConfig(name="small"), Path("metrics.jsonl"), epochs_done, run_id)


def runs(uri: str) -> list[Run]:
    client = mlflow.MlflowClient(uri)
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in mlflow.MlflowClient(uri).get_metric_history(run_id, name)]


def whole_run(status: str = "FINISHED") -> MlflowTracker:
    t = tracker()
    t.start(PARAMETERS, "data/train", DIGEST)
    for epoch, values in enumerate(METRICS, 1):
        t.log_metrics(epoch, values)
    t.end(status)
    return t


def test_a_training_run_is_one_mlflow_run_with_everything(store: str) -> None:
    figures = Path("figures")
    figures.mkdir()
    (figures / "curves.png").write_bytes(b"png")
    Path("config.yaml").write_text("lr: 0.1")
    t = tracker()
    t.start(PARAMETERS, "data/train", DIGEST)
    for epoch, values in enumerate(METRICS, 1):
        t.log_metrics(epoch, values)
    t.log_files([Path("config.yaml"), figures])
    t.end("FINISHED")

    (run,) = runs(store)
    assert run.info.run_id == t.run_id
    assert run.info.run_name == "small"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "model": "simple_cnn", "dropout": "None"}
    assert history(store, t.run_id, "val/accuracy") == [(1, 0.5), (2, 0.75)]
    assert history(store, t.run_id, "train/loss") == [(1, 0.9), (2, 0.4)]
    (dataset,) = run.inputs.dataset_inputs
    assert DIGEST.startswith(dataset.dataset.digest)
    assert dataset.dataset.name == "train"
    client = mlflow.MlflowClient(store)
    assert [f.path for f in client.list_artifacts(t.run_id)] == ["config.yaml", "figures"]
    assert [f.path for f in client.list_artifacts(t.run_id, "figures")] == ["figures/curves.png"]


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_status_is_the_one_given(store: str, status: str) -> None:
    whole_run(status)
    assert [run.info.status for run in runs(store)] == [status]


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(store: str) -> None:
    first = whole_run("KILLED")
    mlflow.MlflowClient(store).log_metric(first.run_id, "images_per_second", 7.0, step=2)
    t = tracker(1, first.run_id)  # the second epoch is done again
    t.start({**PARAMETERS, "lr": 0.5}, "data/train", DIGEST)
    t.log_metrics(2, {"train/loss": 0.4, "val/accuracy": 0.75, "images_per_second": 9.0})
    t.log_metrics(3, {"train/loss": 0.2, "val/accuracy": 0.9})
    t.end("FINISHED")
    (run,) = runs(store)
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.1"
    assert run.data.params["resume.1.lr"] == "0.5"
    assert history(store, t.run_id, "val/accuracy") == [(1, 0.5), (2, 0.75), (3, 0.9)]
    assert history(store, t.run_id, "images_per_second") == [(2, 7.0)]
    assert [row["val/accuracy"] for row in read_metrics(Path("metrics.jsonl"))] == [0.5, 0.75, 0.9]


def test_a_server_that_refuses_costs_seconds_and_no_metrics(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, REFUSES)
    t, seconds = tracker(), {}

    def timed(name: str, function: Any, *arguments: Any) -> None:
        started = time.perf_counter()
        function(*arguments)
        seconds[name] = time.perf_counter() - started

    timed("start", t.start, PARAMETERS, "data/train", DIGEST)
    t.log_metrics(1, METRICS[0])
    timed("send", t.send)
    timed("log_files", t.log_files, [Path("metrics.jsonl")])
    timed("end", t.end, "FINISHED")
    assert max(seconds.values()) < 8, seconds
    assert [row["val/accuracy"] for row in read_metrics(Path("metrics.jsonl"))] == [0.5]
    printed = capsys.readouterr().out
    assert "warning: MLflow does not answer" in printed
    assert "warning: MLflow missed" in printed
    assert "metrics.jsonl" in printed


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_a_server_missed_is_sent_when_it_is_back(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = tracker()
    use(monkeypatch, REFUSES)
    t.start(PARAMETERS, "data/train", DIGEST)
    t.log_metrics(1, METRICS[0])
    assert t.run_id == ""
    use(monkeypatch, store)
    wait_until(lambda: t.run_id != "")
    t.log_metrics(2, METRICS[1])
    t.end("FINISHED")
    (run,) = runs(store)
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.1"
    assert history(store, t.run_id, "val/accuracy") == [(1, 0.5), (2, 0.75)]


def test_a_server_that_goes_away_after_opening_the_run_does_not_lose_it(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_batch = mlflow.MlflowClient.log_batch

    def away(*args: Any, **options: Any) -> None:
        monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
        raise ConnectionError("gone")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", away)
    whole_run()
    (run,) = runs(store)
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.1"
    assert run.data.metrics["val/accuracy"] == 0.75


def test_a_run_that_was_made_while_nobody_listened_is_found_again(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer came too late: asking once more must not make a second run."""
    start_run = mlflow.start_run

    def too_late(**options: Any) -> None:
        monkeypatch.setattr(mlflow, "start_run", start_run)
        mlflow.MlflowClient().create_run("1", run_name=options["run_name"], tags=options["tags"])
        raise TimeoutError("no answer")

    mlflow.set_experiment("purebred")
    monkeypatch.setattr(mlflow, "start_run", too_late)
    whole_run()
    assert [run.info.status for run in runs(store)] == ["FINISHED"]


def test_a_server_that_hangs_holds_nobody_up(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("START_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(tracking, name, 0.3)
    released = threading.Event()
    set_experiment = mlflow.set_experiment

    def hangs(*arguments: Any, **options: Any) -> Any:
        released.wait(30)
        return set_experiment(*arguments, **options)

    monkeypatch.setattr(mlflow, "set_experiment", hangs)
    t, slowest = tracker(), 0.0
    t.start(PARAMETERS, "data/train", DIGEST)
    for epoch in range(1, 101):
        started = time.perf_counter()
        t.log_metrics(epoch, METRICS[0])
        t.send()
        slowest = max(slowest, time.perf_counter() - started)
    started = time.perf_counter()
    t.end("FINISHED")
    assert time.perf_counter() - started < 2
    assert slowest < 0.1
    assert "python train/sync.py" in capsys.readouterr().out
    released.set()
    t.over.wait(30)
    (run,) = runs(store)
    assert run.info.status == "FINISHED"
    assert len(history(store, t.run_id, "val/accuracy")) == 100


def test_a_database_that_is_locked_for_a_while_gets_everything_once(store: str) -> None:
    t = tracker()
    t.start(PARAMETERS, "data/train", DIGEST)
    with closing(sqlite3.connect("mlflow.db", isolation_level=None)) as other:
        other.execute("begin exclusive")
        t.log_metrics(1, METRICS[0])
        t.send()
        time.sleep(0.5)
        other.execute("commit")
    t.log_metrics(2, METRICS[1])
    t.end("FINISHED")
    (run,) = runs(store)
    assert run.info.status == "FINISHED"
    assert history(store, t.run_id, "val/accuracy") == [(1, 0.5), (2, 0.75)]


def test_sync_sends_all_that_was_missed_once(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.yaml").write_text("lr: 0.1")
    use(monkeypatch, REFUSES)
    t = tracker()
    t.start(PARAMETERS, "data/train", DIGEST)
    for epoch, values in enumerate(METRICS, 1):
        t.log_metrics(epoch, values)
    t.log_files([Path("config.yaml")])
    t.end("FINISHED")
    assert sync.main(["."]) == 1
    assert "MLflow does not answer" in capsys.readouterr().err
    use(monkeypatch, store)
    for _ in range(2):
        assert sync.main(["."]) == 0
        (run,) = runs(store)
        assert run.info.status == "FINISHED"
        assert run.data.params == {"lr": "0.1", "model": "simple_cnn", "dropout": "None"}
        assert history(store, run.info.run_id, "val/accuracy") == [(1, 0.5), (2, 0.75)]
        assert [f.path for f in mlflow.MlflowClient(store).list_artifacts(run.info.run_id)] == [
            "config.yaml"
        ]
    record = read_record(Path("tracking.json"))
    assert record is not None
    assert record.run_id == run.info.run_id


def test_sync_ends_the_run_of_a_process_that_was_killed(store: str) -> None:
    t = tracker()
    t.start(PARAMETERS, "data/train", DIGEST)
    t.log_metrics(1, METRICS[0])
    assert runs(store)[0].info.status == "RUNNING"
    assert sync.main(["."]) == 0  # that thread never says how it ended
    (run,) = runs(store)
    assert run.info.status == "KILLED"
    assert history(store, t.run_id, "val/accuracy") == [(1, 0.5)]


def test_sync_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sync.main([str(tmp_path / "nothing")]) == 2
    assert "has no readable tracking.json" in capsys.readouterr().err


def test_a_run_of_a_sweep_is_a_child_and_lost_ones_are_ended(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = registry.open_parent("purebred", "sweep", "", {"epochs": "3"})
    for name, value in tracking.child_environment(parent, {"sweep.trial": "4"}).items():
        monkeypatch.setenv(name, value)
    done = whole_run()
    Path("tracking.json").unlink()  # another run directory
    lost = tracker()
    lost.start({}, "data/train", DIGEST)
    registry.end_children(parent)
    by_id = {run.info.run_id: run for run in runs(store)}
    for run_id, status in ((done.run_id, "FINISHED"), (lost.run_id, "KILLED")):
        assert by_id[run_id].info.status == status
        assert by_id[run_id].data.tags["mlflow.parentRunId"] == parent
        assert by_id[run_id].data.tags["sweep.trial"] == "4"
    assert by_id[parent].info.status == "RUNNING"
    assert by_id[parent].data.params == {"epochs": "3"}
    registry.log_parent(parent, [("val/accuracy", 0.5, 0, 1000)] * 2, {"best.lr": "0.1"}, status="FINISHED")
    assert history(store, parent, "val/accuracy") == [(0, 0.5)]
    assert mlflow.MlflowClient(store).get_run(parent).info.status == "FINISHED"
    assert registry.open_parent("purebred", "sweep", parent, {}) == parent
    assert mlflow.MlflowClient(store).get_run(parent).info.status == "RUNNING"


NAMES = ["고양이", "a\nb", "$x", "shiba inu (3)", "x" * 300, "a/b", "🐱", "..."]
PATHS = ["..", "a/", "a//b", "/a"]  # labels of a CSV manifest can be anything


@pytest.mark.parametrize(
    "classes",
    [NAMES, *([name] for name in PATHS)],
    ids=str,
)
def test_class_names_of_any_kind_are_metric_names(store: str, classes: list[str]) -> None:
    names = [f"f1/{name}" for name in classes]
    t = tracker()
    t.start({}, "data", DIGEST)
    t.log_metrics(1, {**dict.fromkeys(names, 0.5), "val/accuracy": 0.9})
    t.end("FINISHED")
    (run,) = runs(store)
    assert run.data.metrics["val/accuracy"] == 0.9
    assert set(run.data.metrics) >= {metric_name(name) for name in names}


def test_metrics_that_are_not_finite_are_logged(store: str) -> None:
    t = tracker()
    t.start({}, "data", DIGEST)
    t.log_metrics(1, {"val/log_loss": float("nan"), "val/accuracy": 0.5})
    t.end("FINISHED")
    assert runs(store)[0].data.metrics["val/accuracy"] == 0.5
    assert len(read_metrics(Path("metrics.jsonl"))) == 1


def test_the_default_store_is_sqlite_in_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracking.connect()
    assert mlflow.get_tracking_uri() == "sqlite:///mlflow.db"
    assert int(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]) <= 1

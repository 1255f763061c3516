"""MLflow has exactly one truthful run, and training neither waits for it nor loses a number to it."""

import json
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow_store import DIGEST, METRICS, PARAMETERS, REFUSES, history, runs, tracker, use, whole_run

from train import sync
from train.config import TrainConfig
from train.tracking import mlflow_tracker
from train.tracking.base import read_metrics
from train.tracking.mlflow_tracker import MlflowTracker
from train.tracking.run_record import read_record

pytestmark = pytest.mark.usefixtures("store")


def test_a_training_run_is_one_mlflow_run_with_everything(store: str) -> None:
    figures = Path("figures")
    figures.mkdir()
    (figures / "curves.png").write_bytes(b"png")
    Path("config.yaml").write_text("lr: 0.1")
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST), ("data/val", DIGEST[::-1]))
    for epoch, values in enumerate(METRICS, 1):
        t.log_metrics(epoch, values)
    t.log_best(1, {"val/accuracy": 0.5})
    t.log_files([Path("config.yaml"), figures])
    t.end("FINISHED")

    (run,) = runs(store)
    assert run.info.run_id == t.run_id
    assert run.data.metrics["val/accuracy"] == 0.75
    assert (run.data.metrics["best/val/accuracy"], run.data.metrics["best/epoch"]) == (0.5, 1)
    assert run.info.run_name == "small"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "model": "simple_cnn", "dropout": "None"}
    assert history(store, t.run_id, "val/accuracy") == [(1, 0.5), (2, 0.75)]
    assert history(store, t.run_id, "train/loss") == [(1, 0.9), (2, 0.4)]
    inputs = {
        (tag.value, each.dataset.name, each.dataset.digest)
        for each in run.inputs.dataset_inputs
        for tag in each.tags
    }
    wanted = {"kind": "training", "model": "resnet18", "data": "train", "host": socket.gethostname()}
    assert {name: run.data.tags[f"purebred.{name}"] for name in wanted} == wanted
    experiment = mlflow.MlflowClient(store).get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(experiment.tags["mlflow.sharedViewState.purebred"])
    columns = ["metrics.`best/val/accuracy`", "metrics.`best/val/log_loss`"]
    for state in (view, json.loads(view["state"])):
        assert (state["orderByKey"], state["selectedColumns"][:2]) == (columns[0], columns)
    assert inputs == {("training", "train", DIGEST[:36]), ("validation", "val", DIGEST[::-1][:36])}
    client = mlflow.MlflowClient(store)
    assert [f.path for f in client.list_artifacts(t.run_id)] == ["config.yaml", "figures"]
    assert [f.path for f in client.list_artifacts(t.run_id, "figures")] == ["figures/curves.png"]


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_status_is_the_one_given(store: str, status: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole_run(status)
    assert f"mlflow ui --backend-store-uri {store}" in capsys.readouterr().out
    assert [run.info.status for run in runs(store)] == [status]


def test_a_resumed_run_continues_in_the_same_mlflow_run(store: str) -> None:
    first = whole_run("KILLED")
    mlflow.MlflowClient(store).log_metric(first.run_id, "images_per_second", 7.0, step=2)
    mlflow.MlflowClient(store).log_metric(first.run_id, "val/log_loss", float("nan"), step=2)
    assert first.record.complete
    t = tracker(1, first.run_id)  # the second epoch is done again
    assert not t.record.complete
    t.start({**PARAMETERS, "lr": 0.5}, ("data/train", DIGEST))
    again = {"train/loss": 0.4, "val/accuracy": 0.75, "val/log_loss": float("nan")}
    t.log_metrics(2, {**again, "images_per_second": 9.0})
    t.log_metrics(3, {"train/loss": 0.2, "val/accuracy": 0.9})
    t.end("FINISHED")
    (run,) = runs(store)
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.1"
    assert run.data.params["resume.1.lr"] == "0.5"
    assert history(store, t.run_id, "val/accuracy") == [(1, 0.5), (2, 0.75), (3, 0.9)]
    assert history(store, t.run_id, "images_per_second") == [(2, 7.0)]
    assert len(history(store, t.run_id, "val/log_loss")) == 1
    assert [row["val/accuracy"] for row in read_metrics(Path("metrics.jsonl"))] == [0.5, 0.75, 0.9]


def test_a_copied_run_directory_that_is_resumed_is_a_run_of_its_own(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = whole_run()
    Path("copy").mkdir()
    for name in ("metrics.jsonl", "tracking.json"):
        shutil.copy(name, Path("copy", name))
    for _ in range(2):  # the second time it is its own
        copy = MlflowTracker(TrainConfig(name="copy"), Path("copy/metrics.jsonl"), 2, first.run_id)
        copy.start(PARAMETERS, ("data/train", DIGEST))
        copy.log_metrics(3, METRICS[1])
        copy.end("FINISHED")
    assert capsys.readouterr().out.count("a copy of") == 1
    assert len(runs(store)) == 2
    assert history(store, first.run_id, "train/loss") == [(1, 0.9), (2, 0.4)]
    assert history(store, copy.run_id, "train/loss") == [(1, 0.9), (2, 0.4), (3, 0.4)]


def test_a_run_directory_that_was_moved_is_the_same_run(
    store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = whole_run()
    (tmp_path / "moved").mkdir()
    for name in ("metrics.jsonl", "tracking.json"):
        Path(name).rename(tmp_path / "moved" / name)
    monkeypatch.chdir(tmp_path / "moved")
    resumed = tracker(2)
    resumed.start(PARAMETERS, ("data/train", DIGEST))
    resumed.end("FINISHED")
    assert [run.info.run_id for run in runs(store)] == [first.run_id]
    assert read_record(Path("tracking.json")).folder == str(tmp_path / "moved")


def test_another_experiment_at_a_resume_is_a_warning_and_no_parameter(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole_run()
    config = TrainConfig(name="small", experiment="other")
    resumed = MlflowTracker(config, Path("metrics.jsonl"), 2, "")
    resumed.start({**PARAMETERS, "experiment": "other"}, ("data/train", DIGEST))
    resumed.end("FINISHED")
    assert "--experiment other has no effect" in capsys.readouterr().out
    (run,) = runs(store)
    assert not any(name.startswith("resume.") for name in run.data.params)


def test_a_data_set_that_mlflow_never_heard_of_is_logged_by_the_resumed_run(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_inputs", lambda *_: 1 / 0)
        first = whole_run("KILLED")
    (run,) = runs(store)
    assert not run.inputs.dataset_inputs
    t = tracker(1, first.run_id)
    t.start(PARAMETERS, ("data/train", DIGEST))
    t.end("FINISHED")
    (run,) = runs(store)
    assert [item.dataset.digest for item in run.inputs.dataset_inputs] == [DIGEST[:36]]


def test_a_server_that_refuses_costs_seconds_and_no_metrics(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, REFUSES)
    t, seconds = tracker(), {}

    def timed(name: str, function: Any, *arguments: Any) -> None:
        started = time.perf_counter()
        function(*arguments)
        seconds[name] = time.perf_counter() - started

    timed("start", t.start, PARAMETERS, ("data/train", DIGEST))
    t.log_metrics(1, METRICS[0])
    timed("send", t.send)
    timed("log_files", t.log_files, [Path("metrics.jsonl")])
    timed("end", t.end, "FINISHED")
    assert max(seconds.values()) < 8, seconds
    assert [row["val/accuracy"] for row in read_metrics(Path("metrics.jsonl"))] == [0.5]
    printed = capsys.readouterr().out
    assert f"warning: MLflow at {REFUSES} does not answer" in printed
    assert "python train/sync.py ." in printed


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_a_server_missed_is_sent_when_it_is_back(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = tracker()
    use(monkeypatch, REFUSES)
    t.start(PARAMETERS, ("data/train", DIGEST))
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


def test_a_file_that_could_not_be_sent_is_sent_again_and_one_that_is_gone_holds_up_none(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log_artifact = mlflow.MlflowClient.log_artifact

    def away(*_: Any) -> None:
        monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", log_artifact)
        raise ConnectionError("gone")

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", away)
    Path("best.pt").write_bytes(b"weights")
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST))
    t.log_files([Path("deleted.png"), Path("best.pt")])
    t.end("FINISHED")
    assert t.record.complete
    assert [f.path for f in mlflow.MlflowClient(store).list_artifacts(t.run_id)] == ["best.pt"]
    assert "warning: deleted.png" in capsys.readouterr().out


def test_more_parameters_and_classes_than_mlflow_takes_in_one_call_are_all_there(store: str) -> None:
    t = tracker()
    t.start({f"setting{i}": i for i in range(101)}, ("data/train", DIGEST))
    t.log_metrics(1, {f"f1/class{i}": 0.5 for i in range(1001)})
    t.end("FINISHED")
    (run,) = runs(store)
    assert len(run.data.params) == 101
    assert len([name for name in run.data.metrics if name.startswith("f1/")]) == 1001


def test_a_run_that_was_made_while_nobody_listened_is_found_again(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer came too late: asking once more must not make a second run, in another process neither."""
    create_run, known = mlflow.MlflowClient.create_run, []

    def too_late(*arguments: Any, **options: Any) -> None:
        known.append(read_record(Path("tracking.json")))
        monkeypatch.setattr(mlflow.MlflowClient, "create_run", create_run)
        create_run(*arguments, **options)
        raise TimeoutError("no answer")

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", too_late)
    t = whole_run()
    assert [(record.requested, record.key) for record in known] == [(True, t.record.key)]
    assert [run.info.status for run in runs(store)] == ["FINISHED"]


def test_a_server_that_hangs_holds_nobody_up(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("START_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(mlflow_tracker, name, 0.3)
    released = threading.Event()
    get_experiment = mlflow.MlflowClient.get_experiment_by_name

    def hangs(*arguments: Any) -> Any:
        released.wait(30)
        return get_experiment(*arguments)

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", hangs)
    t, slowest = tracker(), 0.0
    t.start(PARAMETERS, ("data/train", DIGEST))
    for epoch in range(1, 101):
        started = time.perf_counter()
        t.log_metrics(epoch, METRICS[0])
        t.send()
        slowest = max(slowest, time.perf_counter() - started)
    started = time.perf_counter()
    t.end("FINISHED")
    assert time.perf_counter() - started < 10  # the server answers after 30
    assert slowest < 5
    assert "python train/sync.py" in capsys.readouterr().out
    released.set()
    t.over.wait(30)
    (run,) = runs(store)
    assert run.info.status == "FINISHED"
    assert len(history(store, t.run_id, "val/accuracy")) == 100


@pytest.mark.parametrize(("status", "whole"), [("FINISHED", True), ("KILLED", False)])
def test_large_files_are_waited_for_when_nothing_presses(
    store: str, monkeypatch: pytest.MonkeyPatch, status: str, whole: bool
) -> None:
    monkeypatch.setattr(mlflow_tracker, "END_SECONDS", 0.3)
    log_artifact, released = mlflow.MlflowClient.log_artifact, threading.Event()

    def slow(*arguments: Any) -> None:
        released.wait(3)
        log_artifact(*arguments)

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", slow)
    Path("best.pt").write_bytes(b"weights")
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST))
    t.log_files([Path("best.pt")])
    t.end(status)
    assert t.record.complete == whole
    released.set()
    assert t.over.wait(30)


def test_a_database_that_is_locked_for_a_while_gets_everything_once(store: str) -> None:
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST))
    with closing(sqlite3.connect("mlflow.db", isolation_level=None)) as other:
        other.execute("begin exclusive")
        t.log_metrics(1, METRICS[0])
        t.send()
        wait_until(lambda: not t.wake.is_set())  # it is sending
        other.execute("commit")
    t.log_metrics(2, METRICS[1])
    t.end("FINISHED")
    (run,) = runs(store)
    assert run.info.status == "FINISHED"
    assert history(store, t.run_id, "val/accuracy") == [(1, 0.5), (2, 0.75)]


def test_metrics_that_are_not_finite_are_logged(store: str) -> None:
    t = tracker()
    t.start({}, ("data", DIGEST))
    t.log_metrics(1, {"val/log_loss": float("nan"), "val/accuracy": 0.5})
    t.end("FINISHED")
    assert runs(store)[0].data.metrics["val/accuracy"] == 0.5
    assert len(read_metrics(Path("metrics.jsonl"))) == 1


def test_an_end_that_mlflow_missed_is_sent_again(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_terminated = mlflow.MlflowClient.set_terminated

    def away(*args: Any, **options: Any) -> None:
        monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", set_terminated)
        raise ConnectionError("gone")

    monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", away)
    whole_run("KILLED")
    assert [run.info.status for run in runs(store)] == ["KILLED"]


def test_a_running_run_and_a_killed_one_have_their_best_metrics(store: str) -> None:
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST))
    t.log_metrics(1, METRICS[0])
    t.log_best(1, {"val/accuracy": 0.5})
    t.send()
    wait_until(lambda: runs(store)[0].data.metrics.get("best/val/accuracy") == 0.5)
    assert runs(store)[0].info.status == "RUNNING"
    t.log_metrics(2, METRICS[1])
    t.log_best(2, {"val/accuracy": 0.75})  # and now the process is killed
    assert sync.main(["."]) == 0
    (run,) = runs(store)
    assert run.info.status == "KILLED"
    assert (run.data.metrics["best/val/accuracy"], run.data.metrics["best/epoch"]) == (0.75, 2)


def test_the_best_metrics_of_a_resumed_run_are_logged_once(store: str) -> None:
    first = tracker()
    first.start(PARAMETERS, ("data/train", DIGEST))
    first.log_metrics(1, METRICS[0])
    first.log_best(1, {"val/accuracy": 0.5})
    first.end("KILLED")
    t = tracker(0, first.run_id)
    t.start(PARAMETERS, ("data/train", DIGEST))
    t.log_metrics(1, METRICS[0])  # done again
    t.log_best(1, {"val/accuracy": 0.5})
    t.end("FINISHED")
    assert history(store, t.run_id, "best/val/accuracy") == [(1, 0.5)]

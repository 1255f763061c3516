"""Which MLflow run and experiment a training run is logged to, at first and when it is resumed."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from mlflow_store import DIGEST, METRICS, PARAMETERS, REFUSES, history, runs, tracker, whole_run

from train import sync
from train.config import TrainConfig
from train.tracking import client as tracking
from train.tracking.client import TrackingStore
from train.tracking.mlflow_tracker import MlflowTracker
from train.tracking.run_record import read_record

pytestmark = pytest.mark.usefixtures("store")


@pytest.mark.parametrize("state", ["deleted", "finished", "of another experiment", "unknown", "another's"])
def test_a_run_id_of_the_environment_that_does_not_suit_is_refused_and_stays_as_it_is(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    client = mlflow.MlflowClient(store)
    other = client.create_experiment("other")
    run_id = "f" * 32
    if state != "unknown":
        run_id = client.create_run(
            other, tags={"purebred.key": "k"} if state == "another's" else {}
        ).info.run_id
    if state == "deleted":
        client.delete_run(run_id)
    if state == "finished":
        client.set_terminated(run_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    experiment = "mine" if state == "of another experiment" else ""
    t = MlflowTracker(TrainConfig(name="small", experiment=experiment), Path("metrics.jsonl"), 0, "")
    t.start(PARAMETERS, ("data/train", DIGEST))
    t.log_metrics(1, METRICS[0])
    t.end("FINISHED")
    printed = capsys.readouterr().out
    assert f"run {run_id}" in printed
    assert "MLFLOW_RUN_ID" in printed
    assert all(not run.data.params for run in runs(store))
    monkeypatch.delenv("MLFLOW_RUN_ID")
    assert sync.main(["."]) == 0
    assert client.get_run(read_record(Path("tracking.json")).run_id).info.status == "FINISHED"  # type: ignore[union-attr]


def test_a_run_that_the_environment_names_is_the_one(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = mlflow.MlflowClient(store)
    run_id = client.create_run(client.create_experiment("other")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    whole_run()
    (run,) = runs(store)
    assert (run.info.run_id, run.info.status, run.data.params["lr"]) == (run_id, "FINISHED", "0.1")


@pytest.mark.parametrize(
    ("given", "variables", "expected"),
    [
        ("", {}, "purebred"),
        ("", {"MLFLOW_EXPERIMENT_NAME": "cats"}, "cats"),
        ("", {"MLFLOW_EXPERIMENT_ID": "dogs"}, "dogs"),
        ("mine", {"MLFLOW_EXPERIMENT_NAME": "cats"}, "mine"),
    ],
)
def test_the_experiment_is_the_one_given_or_that_of_the_environment(
    store: str, monkeypatch: pytest.MonkeyPatch, given: str, variables: dict[str, str], expected: str
) -> None:
    client = mlflow.MlflowClient(store)
    monkeypatch.setattr(
        mlflow.tracking.fluent, "_active_experiment_id", None
    )  # other tests' of this process
    for name, value in variables.items():
        monkeypatch.setenv(name, client.create_experiment(value) if name.endswith("ID") else value)
    t = MlflowTracker(TrainConfig(name="small", experiment=given), Path("metrics.jsonl"), 0, "")
    t.start(PARAMETERS, ("data/train", DIGEST))
    t.end("FINISHED")
    (run,) = runs(store)
    assert client.get_experiment(run.info.experiment_id).name == expected
    assert os.environ.get("MLFLOW_EXPERIMENT_ID") == (
        run.info.experiment_id if "MLFLOW_EXPERIMENT_ID" in variables else None
    )


@pytest.mark.parametrize("deleted", ["run", "experiment", "for good"])
def test_a_run_that_was_deleted_is_not_resumed_and_the_way_back_is_named(
    store: str, capsys: pytest.CaptureFixture[str], deleted: str
) -> None:
    first = whole_run("KILLED")
    client = mlflow.MlflowClient(store)
    if deleted == "experiment":
        client.delete_experiment(runs(store)[0].info.experiment_id)
    elif deleted == "run":
        client.delete_run(first.run_id)
    else:
        with closing(sqlite3.connect("mlflow.db", isolation_level=None)) as database:
            database.execute("delete from runs")
    t = tracker(2, first.run_id)
    t.start(PARAMETERS, ("data/train", DIGEST))
    t.end("FINISHED")
    ways = {"run": "mlflow runs restore", "experiment": "mlflow experiments restore", "for good": "run_id"}
    printed = capsys.readouterr().out
    assert ways[deleted] in printed
    assert "does not answer" not in printed
    if deleted == "for good":
        t.record.run_id = ""
        t.record.save(Path("tracking.json"))
        assert sync.main(["."]) == 0
        assert history(store, runs(store)[0].info.run_id, "val/accuracy") == [(1, 0.5), (2, 0.75)]


def test_another_folder_finds_the_store_of_the_run(
    store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(tracking, "DEFAULT_URI", store)
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST))
    t.log_metrics(1, METRICS[0])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(tracking, "DEFAULT_URI", REFUSES)
    assert sync.main([str(tmp_path)]) == 0
    assert runs(store)[0].info.status == "KILLED"
    (tmp_path / "mlflow.db").rename(tmp_path / "gone.db")
    record = read_record(tmp_path / "tracking.json")
    assert record is not None
    record.complete = False
    record.save(tmp_path / "tracking.json")
    assert sync.main([str(tmp_path)]) == 2
    assert not (tmp_path / "mlflow.db").exists()


def test_the_store_is_recorded_for_any_folder_and_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for uri, recorded in (
        ("", f"sqlite:///{tmp_path}/mlflow.db"),
        ("sqlite:///mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"),
        (f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"),
        ("http://server:5000", "http://server:5000"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert TrackingStore().uri == recorded
    monkeypatch.setattr(mlflow, "MlflowClient", lambda uri: None)  # whose driver may not be installed
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@db/m")
    assert TrackingStore().uri == "postgresql://me:***@db/m"


def test_changed_parameters_are_logged_each_time(store: str) -> None:
    run_id = whole_run("KILLED").run_id
    for lr in (0.5, 0.7, 0.7):
        t = tracker(2, run_id)
        t.start({**PARAMETERS, "lr": lr}, ("data/train", DIGEST))
        t.end("FINISHED")
        assert t.record.complete
    t = tracker(2, run_id)
    t.log_metrics(3, METRICS[1])
    t.start({**PARAMETERS, "lr": 0.7}, ("data/train", DIGEST))
    t.end("FINISHED")
    (run,) = runs(store)
    changed = {name: value for name, value in run.data.params.items() if name not in PARAMETERS}
    assert changed == {"resume.2.lr": "0.5", "resume.2-2.lr": "0.7"}
    assert run.data.params["lr"] == "0.1"

"""The run of a sweep has its trials' runs as children, and lost ones are ended."""

from pathlib import Path

import mlflow
import pytest
from mlflow_store import DIGEST, history, runs, tracker, whole_run

from train.tracking.parent_run import end_children, log_parent, open_parent
from train.tracking.run_record import child_environment

pytestmark = pytest.mark.usefixtures("store")


def test_a_run_of_a_sweep_is_a_child_and_lost_ones_are_ended(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = open_parent("purebred", "sweep", "", {"epochs": "3"})
    for name, value in child_environment(parent, {"sweep.trial": "4"}).items():
        monkeypatch.setenv(name, value)
    done = whole_run()
    Path("tracking.json").unlink()  # another run directory
    lost = tracker()
    lost.start({}, ("data/train", DIGEST))
    end_children(parent)
    by_id = {run.info.run_id: run for run in runs(store)}
    for run_id, status in ((done.run_id, "FINISHED"), (lost.run_id, "KILLED")):
        assert by_id[run_id].info.status == status
        assert by_id[run_id].data.tags["mlflow.parentRunId"] == parent
        assert by_id[run_id].data.tags["sweep.trial"] == "4"
    assert by_id[parent].info.status == "RUNNING"
    assert by_id[parent].data.params == {"epochs": "3"}
    assert by_id[parent].data.tags["purebred.kind"] == "sweep"
    log_parent(parent, [("val/accuracy", 0.5, 0, 1000)] * 2, {"best.lr": "0.1"}, status="FINISHED")
    assert history(store, parent, "val/accuracy") == [(0, 0.5)]
    assert mlflow.MlflowClient(store).get_run(parent).info.status == "FINISHED"
    assert open_parent("purebred", "sweep", parent, {}) == parent
    assert mlflow.MlflowClient(store).get_run(parent).info.status == "RUNNING"


def test_a_parameter_that_mlflow_refuses_costs_no_other(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = open_parent("purebred", "sweep", "", {"da*ta": "images", "epochs": "3", "seed": "1"})
    assert mlflow.MlflowClient(store).get_run(parent).data.params == {"epochs": "3", "seed": "1"}
    assert "without its parameter da*ta" in capsys.readouterr().out
    assert len(runs(store)) == 1

"""What is asked of MLflow: the run of a sweep with its children, and no exception but a ValueError."""

from pathlib import Path

import mlflow
import pytest
from mlflow_store import DIGEST, REFUSES, history, runs, tracker, use, whole_run

from train.tracking import mlflow_run, registry

pytestmark = pytest.mark.usefixtures("store")


def test_a_run_of_a_sweep_is_a_child_and_lost_ones_are_ended(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = registry.open_parent("purebred", "sweep", "", {"epochs": "3"})
    for name, value in mlflow_run.child_environment(parent, {"sweep.trial": "4"}).items():
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


@pytest.mark.parametrize("uri", [REFUSES, "sqlite:////proc/no/such.db"])
def test_a_store_that_does_not_answer_is_a_value_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    use(monkeypatch, uri)
    with pytest.raises(ValueError, match=f"MLflow at {uri}: "):
        registry.read_aliases("pets")
    with pytest.raises(ValueError, match=f"MLflow at {uri}: "):
        registry.open_parent("purebred", "sweep", "", {})

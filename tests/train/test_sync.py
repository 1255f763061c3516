"""train/sync.py sends what MLflow missed, once, with the status of the run."""

import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from conftest import REPOSITORY
from mlflow_store import DIGEST, METRICS, PARAMETERS, REFUSES, history, runs, tracker, use

from train import sync
from train.tracking.run_record import read_record

pytestmark = pytest.mark.usefixtures("store")


def test_sync_sends_all_that_was_missed_once(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.yaml").write_text("lr: 0.1")
    use(monkeypatch, REFUSES)
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST))
    for epoch, values in enumerate(METRICS, 1):
        t.log_metrics(epoch, values)
    t.log_files([Path("config.yaml")])
    t.end("FINISHED")
    assert sync.main(["."]) == 1
    assert f"MLflow at {REFUSES} does not answer" in capsys.readouterr().err
    use(monkeypatch, store)
    record = read_record(Path("tracking.json"))
    assert record is not None
    record.started, record.ended = 1_000_000, 7_000_000
    record.save(Path("tracking.json"))
    for _ in range(2):
        assert sync.main(["."]) == 0
        (run,) = runs(store)
        assert (run.info.start_time, run.info.end_time) == (1_000_000, 7_000_000)
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
    t.start(PARAMETERS, ("data/train", DIGEST))
    t.log_metrics(1, METRICS[0])
    assert runs(store)[0].info.status == "RUNNING"
    assert sync.main(["."]) == 0  # that thread never ends the run
    (run,) = runs(store)
    assert run.info.status == "KILLED"
    assert run.info.start_time == t.record.started
    assert run.info.end_time == int(1000 * t.rows[0]["time"]), "it was last seen after its epoch"
    assert history(store, t.run_id, "val/accuracy") == [(1, 0.5)]


def test_sync_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sync.main([str(tmp_path / "nothing")]) == 2
    assert "tracking.json" in capsys.readouterr().err


def test_sync_of_a_url_is_an_error_that_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert sync.main(["s3://bucket/runs/a"]) == 2
    assert "s3://bucket/runs/a: " in capsys.readouterr().err


def test_sync_works_from_anywhere_and_passes_over_what_is_gone(
    store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.yaml").write_text("lr: 0.1")
    Path("bad_files.csv").write_text("path,reason")
    use(monkeypatch, REFUSES)
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST))
    t.log_metrics(1, METRICS[0])
    t.log_files([Path("config.yaml"), Path("bad_files.csv")])
    t.end("FINISHED")
    here, there = Path.cwd(), tmp_path / "moved"
    there.mkdir()
    for name in ("tracking.json", "metrics.jsonl", "config.yaml"):
        (here / name).rename(there / name)
    monkeypatch.chdir("/")
    use(monkeypatch, store)
    assert sync.main([str(there)]) == 0
    (run,) = runs(store)
    assert [f.path for f in mlflow.MlflowClient(store).list_artifacts(run.info.run_id)] == ["config.yaml"]
    assert f"warning: {there}/bad_files.csv" in capsys.readouterr().out
    (source,) = run.inputs.dataset_inputs
    assert f"{here}/data/train" in source.dataset.source


def test_a_run_that_another_store_has_is_not_called_complete_and_can_be_logged_anew_whole(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.yaml").write_text("lr: 0.1")
    Path("other.db").write_bytes(Path("mlflow.db").read_bytes())
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST))
    t.log_metrics(1, METRICS[0])
    t.log_files([Path("config.yaml"), Path("metrics.jsonl")])
    t.end("FINISHED")
    assert sync.main(["."]) == 0
    use(monkeypatch, "sqlite:///other.db")
    assert sync.main(["."]) == 2
    assert store in capsys.readouterr().err
    record = read_record(Path("tracking.json"))
    assert record is not None
    record.run_id = ""
    record.save(Path("tracking.json"))
    assert sync.main(["."]) == 0
    (run,) = runs("sqlite:///other.db")
    assert run.data.metrics["val/accuracy"] == 0.5
    assert {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)} == {
        "config.yaml",
        "metrics.jsonl",
    }


HOLDS = """
import sys
from pathlib import Path
from train.runs.resume import only_writer
with only_writer(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_sync_leaves_a_run_alone_that_is_being_trained(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would end the run in MLflow, as KILLED."""
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST))
    command = [sys.executable, "-c", HOLDS, str(Path.cwd())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert sync.main(["."]) == 2
        assert "being trained" in capsys.readouterr().err
        assert runs(store)[0].info.status == "RUNNING"
        other.communicate(b"")
    assert sync.main(["."]) == 0

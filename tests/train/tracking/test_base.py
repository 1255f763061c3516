"""metrics.jsonl has a row for each epoch, whatever becomes of disk and process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.config import TrainConfig
from train.tracking.base import MetricsFile, NullTracker, build_tracker, read_metrics

METRICS = [{"train/loss": 0.9, "val/accuracy": 0.5}, {"train/loss": 0.4, "val/accuracy": 0.75}]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_other_ranks_touch_nothing() -> None:
    t = build_tracker(TrainConfig(), False, Path("metrics.jsonl"), 0, "")
    assert type(t) is NullTracker
    t.start({}, ("data", "digest"))
    t.log_metrics(1, METRICS[0])
    t.log_files([Path()])
    t.end("FINISHED")
    assert os.listdir() == []
    assert t.run_id == ""


def test_without_tracking_metrics_are_in_the_file_alone() -> None:
    t = build_tracker(TrainConfig(track=False), True, Path("metrics.jsonl"), 0, "")
    t.start({}, ("data", "digest"))
    t.log_metrics(1, METRICS[0])
    t.end("FINISHED")
    assert os.listdir() == ["metrics.jsonl"]
    (row,) = read_metrics(Path("metrics.jsonl"))
    assert row == {"epoch": 1, "time": row["time"], **METRICS[0]}
    assert abs(row["time"] - time.time()) < 60


def test_a_full_disk_stops_nothing_and_the_file_is_whole_again_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("metrics.jsonl")
    t = MetricsFile(path, 0)
    t.log_metrics(1, METRICS[0])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
        t.log_metrics(2, METRICS[1])
    assert "WARNING: metrics.jsonl was not written: [Errno 28] No space left" in capsys.readouterr().out
    t.log_metrics(3, METRICS[1])
    assert [row["epoch"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_line_is_on_the_disk_before_the_epochs_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine that dies leaves a checkpoint whose epoch has no metrics."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    MetricsFile(Path("metrics.jsonl"), 0).log_metrics(1, METRICS[0])
    assert synced == [Path("metrics.jsonl").stat().st_size]


def test_lines_of_work_that_is_done_again_are_dropped() -> None:
    path = Path("metrics.jsonl")
    path.write_text("".join(json.dumps({"epoch": e, "time": 0.0, "x": e}) + "\n" for e in (1, 2, 3)))
    assert [row["epoch"] for row in MetricsFile(path, 2).rows] == [1, 2]
    assert [row["epoch"] for row in read_metrics(path)] == [1, 2]


def test_a_line_that_was_cut_off_is_dropped_on_resume() -> None:
    """The power went while it was written; its epoch, without a checkpoint, is done again."""
    path = Path("metrics.jsonl")
    path.write_text(json.dumps({"epoch": 1, "time": 0.0}) + '\n{"epoch": 2, "ti')
    assert [row["epoch"] for row in MetricsFile(path, 1).rows] == [1]


def test_a_rank_that_has_no_tracker_does_not_import_mlflow() -> None:
    """Nor scikit-learn and matplotlib: seconds of every start and restart."""
    heavy = (
        "{'mlflow', 'sklearn', 'pandas', 'matplotlib'} & {name.partition('.')[0] for name in sys.modules}"
    )
    root = Path(__file__).resolve().parents[3]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import train.main; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

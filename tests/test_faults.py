"""Kill anything, lose nothing: real signals, and weights bit for bit those of a quiet run."""

import os
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest
from forked import RankJob

from benchmarks.jobs import EXACT, SMALL, Job, TrainingJob, weights_sha256
from train.checkpoint import load_checkpoint
from train.data.sample import make_sample
from train.runs.snapshots import list_snapshots
from train.tracking.base import read_metrics

EPOCHS = 3
# so that another number of processes makes the same run
NO_BATCH_NORM = ["--model", "squeezenet1_1", "--dropout", "0", "--optimizer", "sgd", "--lr", "0.01"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("faults")
    make_sample(root / "sample", train_per_class=40, num_test=4)
    data = ["--data", str(root / "sample" / "train"), "--output", "runs"]
    return [*data, *SMALL, *EXACT, "--epochs", str(EPOCHS), *NO_BATCH_NORM]


@pytest.fixture(scope="module")
def quiet(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("quiet")
    with RankJob(cwd, *settings, "--name", "quiet", "--track", "false") as job:
        assert job.wait() == 0, job.printed()
    return job.folder


def same_metrics(a: Path, b: Path) -> bool:
    """Compare all metrics but those of the machine."""

    def plain(folder: Path) -> list[dict[str, float]]:
        machine = ("time", "images_per_second", "data_share")
        rows = read_metrics(folder / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k not in machine} for row in rows]

    return plain(a) == plain(b)


def same_predictions(a: Path, b: Path) -> bool:
    return (a / "val_predictions.csv").read_bytes() == (b / "val_predictions.csv").read_bytes()


def step_after(job: Job, steps: int) -> None:
    """Wait until so many further steps have snapshots."""
    epoch, step = job.place()
    job.wait_for(epoch, step + steps) if step + steps < 9 else job.wait_for(epoch + 1, 1)


def test_asked_to_stop_all_ranks_take_a_snapshot_and_the_same_command_resumes(
    settings: list[str], quiet: Path, empty_store: Path, tmp_path: Path
) -> None:
    """One rank alone gets SIGTERM; MLflow has one run with each number once."""
    shutil.copy(empty_store, tmp_path)
    command = [*settings, "--name", "preempted"]
    with RankJob(tmp_path, *command) as job:
        job.wait_for(0, 3)
        job.kill(1, signal.SIGTERM)
        assert job.wait(60) == 143
    assert "resume with: " in job.printed()
    assert (0, 3) < job.place() < (EPOCHS, 0)
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
        assert db.execute("select status from runs").fetchall() == [("KILLED",)]
    with RankJob(tmp_path, *command) as job:
        assert job.wait() == 0, job.printed()
    assert weights_sha256(job.folder) == weights_sha256(quiet)
    assert same_metrics(job.folder, quiet)
    assert same_predictions(job.folder, quiet)
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
        assert db.execute("select name, status from runs").fetchall() == [("preempted", "FINISHED")]
        for key in ("train/loss", "val/accuracy"):
            steps = db.execute("select step from metrics where key = ? order by step", (key,)).fetchall()
            assert steps == [(1,), (2,), (3,)], key


RAISES_ONCE = """
import ctypes, os, pathlib, threading, time

def raise_in_main_thread():
    while not pathlib.Path("raise").exists():
        time.sleep(0.01)
    main = ctypes.c_ulong(threading.main_thread().ident)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(MemoryError))

if os.environ.get("RANK") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "1":
    threading.Thread(target=raise_in_main_thread, daemon=True).start()
"""


def test_torchrun_restarts_a_rank_that_hangs_raises_or_is_killed_and_its_own_end_costs_nothing(
    settings: list[str], quiet: Path, tmp_path: Path
) -> None:
    """Each in turn on one job; a damaged snapshot is set aside at the last start."""
    (tmp_path / "sitecustomize.py").write_text(RAISES_ONCE)
    command = [
        *settings,
        "--name",
        "hurt",
        "--hang-minutes",
        "0.1",
        "--track",
        "false",
        "--num-workers",
        "1",
    ]
    environment = {"PYTHONPATH": str(tmp_path)}
    with TrainingJob(tmp_path, *command, restarts=2, environment=environment) as job:
        job.wait_for(0, 2)
        job.kill(1, signal.SIGSTOP)
        job.wait_until(lambda: job.attempt() == 1, "restart")
        step_after(job, 2)
        (tmp_path / "raise").touch()
        job.wait_until(lambda: job.attempt() == 2, "restart")
        step_after(job, 2)
        ranks = job.ranks()
        job.agent.kill()
        for rank in ranks:
            rank.wait(60)
    printed = job.printed()
    hung, raised = printed.split("MemoryError", 1)
    assert hung.count("lost contact to another rank") == 1
    assert raised.count("lost contact to another rank") == 1, "its traceback is the first"
    newest = list_snapshots(job.folder / "checkpoints")[0]
    os.truncate(newest, newest.stat().st_size // 2)
    with TrainingJob(tmp_path, *command, restarts=1) as job:
        job.wait_for_text(f"{newest.name} is damaged or truncated")
        step_after(job, 1)
        job.kill(0)
        assert job.wait() == 0, job.printed()
    assert weights_sha256(job.folder) == weights_sha256(quiet)
    assert same_metrics(job.folder, quiet)
    assert same_predictions(job.folder, quiet)


def test_files_that_vanish_beyond_max_bad_end_the_run_which_resumes_when_they_are_back(
    settings: list[str], tmp_path: Path
) -> None:
    data = tmp_path / "images"
    shutil.copytree(settings[1], data)
    gone = sorted(data.iterdir())[::4]
    command = [*settings[2:], "--data", str(data), "--pixel-cache", "off", "--max-bad", "0.1"]
    command += ["--name", "vanish", "--track", "false"]
    with RankJob(tmp_path, *command) as job:
        job.wait_for(0, 2)
        (tmp_path / "elsewhere").mkdir()
        for path in gone:
            path.rename(tmp_path / "elsewhere" / path.name)
        assert job.wait() == 2
    assert "resume with: " in job.printed()
    listed = (job.folder / "bad_files.csv").read_text()
    assert sum(path.name in listed for path in gone) > 8
    for path in gone:
        (tmp_path / "elsewhere" / path.name).rename(path)
    with RankJob(tmp_path, *command) as job:
        assert job.wait() == 0, job.printed()


def test_a_run_of_two_processes_resumes_with_four_and_one(
    settings: list[str], quiet: Path, tmp_path: Path
) -> None:
    """The same global batches, and the same weights up to the order of sums."""
    command = [*settings, "--name", "changing", "--track", "false"]
    with RankJob(tmp_path, *command) as job:
        job.wait_for(0, 4)
        job.kill(0, signal.SIGTERM)
        assert job.wait(60) == 143
    with RankJob(tmp_path, *command, processes=4) as job:
        job.wait_for(1, 2)
        job.kill(3, signal.SIGTERM)
        assert job.wait(60) == 143
    with RankJob(tmp_path, *command, processes=1) as job:
        assert job.wait() == 0, job.printed()
    changing = load_checkpoint(job.folder / "checkpoints" / "last.pt")
    for name, tensor in load_checkpoint(quiet / "checkpoints" / "last.pt")["model"].items():
        assert (changing["model"][name] - tensor).abs().max() < 1e-4, name
    losses = [[row["train/loss"] for row in read_metrics(f / "metrics.jsonl")] for f in (quiet, job.folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

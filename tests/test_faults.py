"""Kill anything, lose nothing: real torchrun, real signals, weights bit for bit those of a quiet run."""

import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from benchmarks.jobs import EXACT, SMALL, TrainingJob, weights_sha256
from train.checkpoint import load_checkpoint
from train.metrics_file import read_metrics
from train.sample import make_sample

EPOCHS = 3
# so that another number of processes makes the same run
NO_BATCH_NORM = ["--model", "squeezenet1_1", "--dropout", "0", "--optimizer", "sgd", "--lr", "0.01"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("faults")
    make_sample(root / "sample", train_per_class=40, num_test=4)
    data = ["--data", str(root / "sample" / "train"), "--output", "runs"]
    return [*data, *SMALL, *EXACT, "--epochs", str(EPOCHS), "--num-workers", "1", *NO_BATCH_NORM]


@pytest.fixture(scope="module")
def quiet(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("quiet")
    with TrainingJob(cwd, *settings, "--name", "quiet", "--track", "false") as job:
        assert job.wait() == 0, job.printed()
    return job.folder


def same_metrics(a: Path, b: Path) -> bool:
    """All but those that tell of the machine."""

    def plain(folder: Path) -> list[dict[str, float]]:
        machine = ("time", "images_per_second", "data_share")
        rows = read_metrics(folder / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k not in machine} for row in rows]

    return plain(a) == plain(b)


def test_told_to_stop_all_ranks_take_a_snapshot_and_the_same_command_goes_on(
    settings: list[str], quiet: Path, tmp_path: Path
) -> None:
    """One rank alone is told, then the agent; MLflow has one run with each number once."""
    command = [*settings, "--name", "preempted"]
    with TrainingJob(tmp_path, *command) as job:
        job.wait_for(0, 3)
        job.kill(1, signal.SIGTERM)
        assert job.wait(60) == 1, "torchrun makes 1 of our 143"
        assert "exitcode  : 143" in job.printed()
        assert "stopped by " in job.printed()
        assert "resume with: " in job.printed()
    place = job.place()
    assert (0, 3) < place < (EPOCHS, 0)
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
        assert db.execute("select status from runs").fetchall() == [("KILLED",)]
    with TrainingJob(tmp_path, *command) as job:
        job.wait_for(place[0], place[1] + 2) if place[1] < 6 else job.wait_for(place[0] + 1, 1)
        job.agent.send_signal(signal.SIGINT)
        told = time.monotonic()
        assert job.wait(60) != 0
        assert time.monotonic() - told < 30, "torchrun kills after that"
    with TrainingJob(tmp_path, *command) as job:
        assert job.wait() == 0, job.printed()
    assert weights_sha256(job.folder) == weights_sha256(quiet)
    assert same_metrics(job.folder, quiet)
    assert job.printed().count("going on from ") == 2
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
        assert db.execute("select name, status from runs").fetchall() == [("preempted", "FINISHED")]
        for key in ("train/loss", "val/accuracy"):
            steps = db.execute("select step from metrics where key = ? order by step", (key,)).fetchall()
            assert steps == [(1,), (2,), (3,)], key


def test_a_rank_that_hangs_is_given_up_and_the_group_goes_on(
    settings: list[str], quiet: Path, tmp_path: Path
) -> None:
    command = [*settings, "--name", "hangs", "--hang-minutes", "0.1", "--track", "false"]
    with TrainingJob(tmp_path, *command, restarts=1) as job:
        job.wait_for(1, 2)
        job.kill(1, signal.SIGSTOP)
        assert job.wait() == 0, job.printed()
    assert "lost contact to another rank" in job.printed()
    assert weights_sha256(job.folder) == weights_sha256(quiet)


RAISES_ONCE = """
import ctypes, os, pathlib, threading, time

def raise_in_main_thread():
    while not list(pathlib.Path("runs").glob("raises/checkpoints/epoch-*[12]-step-*.pt")):
        time.sleep(0.01)
    main = ctypes.c_ulong(threading.main_thread().ident)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(MemoryError))

if os.environ.get("RANK") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    threading.Thread(target=raise_in_main_thread, daemon=True).start()
"""


def test_a_rank_that_raises_is_the_cause_that_is_shown_first_and_the_group_goes_on(
    settings: list[str], quiet: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(RAISES_ONCE)
    command = [*settings, "--name", "raises", "--track", "false"]
    with TrainingJob(tmp_path, *command, restarts=1, environment={"PYTHONPATH": str(tmp_path)}) as job:
        assert job.wait() == 0, job.printed()
    printed = job.printed()
    assert printed.index("MemoryError") < printed.index("lost contact to another rank, which has the cause")
    assert "MemoryError" in printed.split("Traceback")[1], "the first of all"
    assert "going on from " in printed
    assert weights_sha256(job.folder) == weights_sha256(quiet)


def test_files_that_vanish_beyond_max_bad_end_the_run_which_goes_on_when_they_are_back(
    settings: list[str], tmp_path: Path
) -> None:
    data = tmp_path / "images"
    shutil.copytree(settings[1], data)
    gone = sorted(data.iterdir())[::4]
    command = [*settings[2:], "--data", str(data), "--pixel-cache", "off", "--max-bad", "0.1"]
    command += ["--name", "vanish", "--track", "false"]
    with TrainingJob(tmp_path, *command) as job:
        job.wait_for(0, 2)
        (tmp_path / "elsewhere").mkdir()
        for path in gone:
            path.rename(tmp_path / "elsewhere" / path.name)
        assert job.wait() == 1
    printed = job.printed()
    assert "more than --max_bad 0.1 allows" in printed
    assert "once that is mended, resume with: " in printed
    assert printed.index("error: ") < printed.index("Traceback"), "which is torchrun's own"
    listed = (job.folder / "bad_files.csv").read_text()
    assert sum(path.name in listed for path in gone) > 8
    for path in gone:
        (tmp_path / "elsewhere" / path.name).rename(path)
    with TrainingJob(tmp_path, *command) as job:
        assert job.wait() == 0, job.printed()


def test_killed_torchrun_and_a_damaged_snapshot_cost_nothing(
    settings: list[str], quiet: Path, tmp_path: Path
) -> None:
    """SIGKILL of the agent ends its ranks, in order; the newest snapshot is then cut off."""
    command = [*settings, "--name", "agent", "--track", "false"]
    with TrainingJob(tmp_path, *command) as job:
        job.wait_for(1, 3)
        ranks = job.ranks()
        job.agent.kill()
        for rank in ranks:
            rank.wait(60)
    newest = max((job.folder / "checkpoints").glob("epoch-*.pt"))
    os.truncate(newest, newest.stat().st_size // 2)
    with TrainingJob(tmp_path, *command, restarts=1) as job:
        job.wait_for_text("going on from ")
        job.wait_for(2, 1)
        job.kill(0)
        assert job.wait() == 0, job.printed()
    assert f"{newest.name} is damaged or truncated" in job.printed()
    assert weights_sha256(job.folder) == weights_sha256(quiet)
    assert same_metrics(job.folder, quiet)


def test_a_run_of_two_processes_goes_on_with_four_and_one(
    settings: list[str], quiet: Path, tmp_path: Path
) -> None:
    """The same global batches, and the same weights up to the order of sums."""
    command = [*settings, "--name", "changing", "--track", "false"]
    with TrainingJob(tmp_path, *command) as job:
        job.wait_for(0, 4)
        job.agent.terminate()
        job.wait(60)
    with TrainingJob(tmp_path, *command, processes=4) as job:
        job.wait_for(1, 2)
        job.agent.terminate()
        job.wait(60)
    with TrainingJob(tmp_path, *command, processes=1) as job:
        assert job.wait() == 0, job.printed()
    changing = load_checkpoint(job.folder / "checkpoints" / "last.pt")
    for name, tensor in load_checkpoint(quiet / "checkpoints" / "last.pt")["model"].items():
        assert (changing["model"][name] - tensor).abs().max() < 1e-4, name
    losses = [[row["train/loss"] for row in read_metrics(f / "metrics.jsonl")] for f in (quiet, job.folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

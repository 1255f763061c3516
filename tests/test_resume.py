"""The same command goes on with an unfinished run, and with nothing else."""

import errno
import fcntl
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import execute, fork
from train_data import settings

from benchmarks.jobs import wait_until
from train import resume
from train.command_line import save_config
from train.config import TrainConfig
from train.resume import is_locked, only_writer, settle_run, started_at
from train.snapshots import Snapshots, list_snapshots


def make_run(tmp_path: Path, name: str, epochs_done: int = 0, **changes: Any) -> TrainConfig:
    """A run directory of 3 epochs, as far as this."""
    config = settings(tmp_path, name=name, **changes)
    folder = tmp_path / "runs" / name
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    if epochs_done:
        history = {"epochs_done": epochs_done, "best_epoch": 1, "best": {}, "retuned": 0}
        state = {"epoch": epochs_done, "position": {"step": 0}, "history": history}
        assert Snapshots(folder / "checkpoints", 0, print).write(state)
    if epochs_done >= config.epochs:
        (folder / "figures").mkdir()
        (folder / "figures" / "worst_mistakes.png").touch()
    return config


@pytest.mark.parametrize("asked", ["", "auto"])
def test_a_new_name_is_a_new_run(tmp_path: Path, asked: str) -> None:
    assert settle_run(settings(tmp_path, name="a", resume=asked)).resume == ""


@pytest.mark.parametrize("epochs_done", [0, 2])
@pytest.mark.parametrize("asked", ["", "auto"])
def test_the_same_name_goes_on(tmp_path: Path, epochs_done: int, asked: str) -> None:
    config = make_run(tmp_path, "a", epochs_done)
    assert settle_run(config.replace(resume=asked)).resume == str(tmp_path / "runs" / "a")


def test_a_finished_run_is_not_touched_unless_auto_or_longer(tmp_path: Path) -> None:
    config = make_run(tmp_path, "a", 3)
    with pytest.raises(ValueError, match=r"runs/a' exists and is finished: choose another --name"):
        settle_run(config)
    assert settle_run(config.replace(resume="auto")).resume
    assert settle_run(config.replace(epochs=4)).resume


def test_a_finished_run_whose_newest_snapshot_is_damaged_is_finished_all_the_same(tmp_path: Path) -> None:
    config = make_run(tmp_path, "a", 3)
    (newest,) = list_snapshots(tmp_path / "runs" / "a" / "checkpoints")
    newest.unlink()  # last.pt is the same file
    newest.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="exists and is finished"):
        settle_run(config)


def test_a_run_killed_while_its_report_was_drawn_goes_on(tmp_path: Path) -> None:
    config = make_run(tmp_path, "a", 3)
    (tmp_path / "runs" / "a" / "figures" / "worst_mistakes.png").unlink()
    assert settle_run(config).resume == str(tmp_path / "runs" / "a")


def test_a_run_of_other_settings_is_not_touched(tmp_path: Path) -> None:
    config = make_run(tmp_path, "a", 2)
    for asked in ("", "auto"):
        with pytest.raises(ValueError, match=r"exists with other settings \(--batch_size 4 -> 8\)"):
            settle_run(config.replace(batch_size=8, resume=asked))


def test_an_empty_folder_is_what_a_kill_leaves_and_a_full_one_is_somebodys(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    config = settings(tmp_path, name="a")
    assert settle_run(config).resume == str(folder)
    (folder / "thesis.txt").touch()
    with pytest.raises(ValueError, match="exists and is not a run directory"):
        settle_run(config)


def test_auto_without_a_name_takes_the_newest_unfinished_run_of_these_settings(tmp_path: Path) -> None:
    auto = settings(tmp_path, resume="auto")
    assert settle_run(auto).resume == ""
    for name, epochs_done, changes in (
        ("old", 1, {}),
        ("new", 1, {}),
        ("other", 1, {"lr": 0.5}),
        ("elsewhere", 1, {"data": "other"}),
        ("finished", 3, {}),
    ):
        make_run(tmp_path, name, epochs_done, **changes)
        time.sleep(0.02)
    (tmp_path / "runs" / "latest").symlink_to("gone")
    found = settle_run(auto)
    assert (found.resume, found.name) == (str(tmp_path / "runs" / "new"), "new")


HOLDS = """
import sys, time
from pathlib import Path
from train.resume import only_writer
with only_writer(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_writes_and_a_killed_one_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, "a")
    folder = tmp_path / "runs" / "a"
    log = tmp_path / "log"
    other = fork(execute, HOLDS, [str(folder)], cwd=tmp_path, log=log)
    wait_until(lambda: log.exists() and log.read_text() == "held\n")
    monkeypatch.setattr(resume, "WAIT_FOR_LOCK_SECONDS", 0.3)
    said: list[str] = []
    with (
        pytest.raises(ValueError, match="is being trained by another process"),
        only_writer(folder, said.append),
    ):
        pass
    assert said == [f"waiting for another process to leave {folder}"]
    assert is_locked(folder)
    assert settle_run(settings(tmp_path, resume="auto")).resume == ""
    other.kill()
    other.join()
    with only_writer(folder, said.append):
        pass


def test_a_file_system_without_locks_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    make_run(tmp_path, "a", 1)
    monkeypatch.setattr(fcntl, "lockf", refused)
    monkeypatch.setattr(resume, "WAIT_FOR_LOCK_SECONDS", 0.0)
    said: list[str] = []
    with only_writer(tmp_path / "runs" / "a", said.append):
        assert not said
    assert settle_run(settings(tmp_path, resume="auto")).name == "a"


def test_under_torchrun_the_time_of_a_run_is_that_of_its_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are restarted get the name that the first ones got."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    began = psutil.Process(psutil.Process().ppid()).create_time()
    assert started_at() == time.localtime(began)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert time.mktime(started_at()) == pytest.approx(time.time(), abs=2)


def test_a_run_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(ValueError, match=f"run '{tmp_path}' cannot be written: Is a directory"),
        only_writer(tmp_path, print),
    ):
        pass

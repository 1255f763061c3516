"""The same command continues an unfinished run, and nothing else."""

import errno
import fcntl
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import execute, fork
from train_data import settings

from benchmarks.jobs import wait_until
from serve.contract.locks import is_locked
from train.cli import parse_config, save_config
from train.config import TrainConfig
from train.runs import resume
from train.runs.directory import write_status
from train.runs.resume import choose_run, how_to_resume, only_writer, started_at, started_by
from train.runs.snapshots import Snapshots, list_snapshots


def make_run(tmp_path: Path, name: str, epochs_done: int = 0, **changes: Any) -> TrainConfig:
    """A run directory of 3 epochs, as far as this."""
    config = settings(tmp_path, name=name, **changes)
    folder = tmp_path / "runs" / name
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    if epochs_done:
        history = {"epochs_done": epochs_done, "best_epoch": 1, "best": {}, "retuned": 0}
        state = {"epoch": epochs_done, "position": {"step": 0}, "history": history}
        snapshots = Snapshots(folder / "checkpoints", 0, print)
        snapshots.write(state)
        assert snapshots.finish()
    write_status(folder, "FINISHED" if epochs_done >= config.epochs else "KILLED")
    return config


@pytest.mark.parametrize("given", ["", "auto"])
def test_a_new_name_is_a_new_run(tmp_path: Path, given: str) -> None:
    assert choose_run(settings(tmp_path, name="a", resume=given)).resume == ""


@pytest.mark.parametrize("epochs_done", [0, 2])
@pytest.mark.parametrize("given", ["", "auto"])
def test_the_same_name_continues(tmp_path: Path, epochs_done: int, given: str) -> None:
    config = make_run(tmp_path, "a", epochs_done)
    assert choose_run(config.replace(resume=given)).resume == str(tmp_path / "runs" / "a")


def test_a_finished_run_is_not_touched_unless_auto_or_longer(tmp_path: Path) -> None:
    config = make_run(tmp_path, "a", 3)
    with pytest.raises(ValueError, match=r"runs/a'.*finished.*--name"):
        choose_run(config)
    assert choose_run(config.replace(resume="auto")).resume
    assert choose_run(config.replace(epochs=4)).resume


def test_a_finished_run_whose_newest_snapshot_is_damaged_is_finished_all_the_same(tmp_path: Path) -> None:
    config = make_run(tmp_path, "a", 3)
    (newest,) = list_snapshots(tmp_path / "runs" / "a" / "checkpoints")
    newest.unlink()  # last.pt is the same file
    newest.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"runs/a'.*finished"):
        choose_run(config)


@pytest.mark.parametrize("status", ["RUNNING", "KILLED", "FAILED"])
def test_a_run_that_did_not_end_well_after_its_last_epoch_continues(status: str, tmp_path: Path) -> None:
    """As one that was killed while its report was drawn."""
    config = make_run(tmp_path, "a", 3)
    write_status(tmp_path / "runs" / "a", status)
    assert choose_run(config).resume == str(tmp_path / "runs" / "a")


def test_a_run_of_other_settings_is_not_touched(tmp_path: Path) -> None:
    config = make_run(tmp_path, "a", 2)
    for given in ("", "auto"):
        with pytest.raises(ValueError, match=r"--batch-size 4 -> 8"):
            choose_run(config.replace(batch_size=8, resume=given))


def test_an_empty_folder_is_what_a_kill_leaves_and_a_full_one_is_somebodys(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    config = settings(tmp_path, name="a")
    assert choose_run(config).resume == str(folder)
    (folder / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"runs/a'.*--name"):
        choose_run(config)


def test_auto_without_a_name_takes_the_furthest_unfinished_run_of_these_settings(tmp_path: Path) -> None:
    """Not an empty one that was started after it by mistake."""
    auto = settings(tmp_path, resume="auto")
    assert choose_run(auto).resume == ""
    for name, epochs_done, changes in (
        ("far", 2, {}),
        ("newer", 1, {}),
        ("empty", 0, {}),
        ("other", 1, {"lr": 0.5}),
        ("elsewhere", 1, {"data": "other"}),
        ("finished", 3, {}),
    ):
        make_run(tmp_path, name, epochs_done, **changes)
        time.sleep(0.02)
    (tmp_path / "runs" / "latest").symlink_to("gone")
    found = choose_run(auto)
    assert (found.resume, found.name) == (str(tmp_path / "runs" / "far"), "far")


def test_auto_passes_over_folders_that_this_user_may_not_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lost+found in the root of a volume."""
    make_run(tmp_path, "mine", 1)
    (tmp_path / "runs" / "lost+found").mkdir()
    stat = Path.stat

    def refused(path: Path, **options: Any) -> os.stat_result:
        if path.parent.name == "lost+found":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refused)
    assert choose_run(settings(tmp_path, resume="auto")).name == "mine"


def test_of_runs_that_are_equally_far_auto_takes_the_newest(tmp_path: Path) -> None:
    for name, age in (("old", 100), ("new", 50), ("older", 200)):
        make_run(tmp_path, name, 1)
        os.utime(tmp_path / "runs" / name, (time.time() - age,) * 2)
    assert choose_run(settings(tmp_path, resume="auto")).name == "new"


def command_that_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, typed: list[str], run: str = "a b"
) -> str:
    monkeypatch.setattr("sys.orig_argv", typed)
    given = parse_config(typed[typed.index("train/main.py") + 1 :]) if "train/main.py" in typed else None
    assert given is not None
    return how_to_resume(given, given.replace(name=run, output=str(tmp_path / "runs")))


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ([], ["--name", "a b"]),
        (["--resume", "auto"], ["--name", "a b"]),
        (["--name=a b"], []),
        (["--stop-after", "1", "--name", "a b"], ["--stop-after", "0"]),
    ],
)
def test_the_command_that_resumes_is_the_one_that_was_typed_with_the_runs_name(
    given: list[str], added: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_run(tmp_path, "a b", 1)
    typed = ["python3", "train/main.py", "--data", "my cats", *given]
    printed = command_that_resumes(monkeypatch, tmp_path, typed)
    assert shlex.split(printed.partition(": ")[2]) == typed + added


def test_a_run_that_is_named_by_resume_is_resumed_by_the_same_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_run(tmp_path, "a", 1)
    typed = ["python", "train/main.py", "--resume", str(tmp_path / "runs" / "a")]
    assert command_that_resumes(monkeypatch, tmp_path, typed, "a").endswith(shlex.join(typed))


def test_a_run_without_snapshot_is_started_again_under_its_name_and_one_without_folder_not_mentioned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    typed = ["python", "train/main.py", "--data", "x"]
    assert command_that_resumes(monkeypatch, tmp_path, typed, "a") == ""
    make_run(tmp_path, "a")
    printed = command_that_resumes(monkeypatch, tmp_path, typed, "a")
    assert printed.endswith(": python train/main.py --data x --name a")


def test_under_torchrun_the_command_is_torchruns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "torchrun"
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    typed = [sys.executable, str(program), "--nproc_per_node=4", "train/main.py", "--data", "a b"]
    monkeypatch.setattr("psutil.Process.cmdline", lambda self: typed)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert started_by() == typed[1:]
    monkeypatch.setenv("PATH", str(program.parent))
    assert started_by() == ["torchrun", *typed[2:]]


HOLDS = """
import sys, time
from pathlib import Path
from train.runs.resume import only_writer
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
    printed: list[str] = []
    with (
        pytest.raises(ValueError, match=r"runs/a"),
        only_writer(folder, printed.append),
    ):
        pass
    assert len(printed) == 1
    assert str(folder) in printed[0]
    assert is_locked(folder / resume.LOCK)
    assert choose_run(settings(tmp_path, resume="auto")).resume == ""
    other.kill()
    other.join()
    with only_writer(folder, printed.append):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_on_a_file_system_without_locks_training_is_possible_with_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    make_run(tmp_path, "a", 1)
    monkeypatch.setattr(fcntl, "lockf", refused)
    monkeypatch.setattr(resume, "WAIT_FOR_LOCK_SECONDS", 0.0)
    printed: list[str] = []
    with only_writer(tmp_path / "runs" / "a", printed.append):
        assert os.strerror(number) in printed[0]
    assert len(printed) == 1
    assert choose_run(settings(tmp_path, resume="auto")).name == "a"


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
        pytest.raises(ValueError, match=f"{tmp_path}.*Is a directory"),
        only_writer(tmp_path, print),
    ):
        pass

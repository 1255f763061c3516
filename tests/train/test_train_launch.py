"""train/launch.py: real torchrun around small programs; forked, as importing torch takes seconds."""

import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from forked import fork

from train import launch

PROGRAM = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
with open(f"starts-{rank}", "a") as file:
    file.write("1")
starts = os.path.getsize(f"starts-{rank}")
"""


def started(folder: Path, program: str, restarts: str, processes: int = 1) -> BaseProcess:
    (folder / "program.py").write_text(PROGRAM + program)
    arguments = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}", "program.py"]
    environment = {"RESTARTS": restarts, "OMP_NUM_THREADS": "1"}
    return fork(_main, arguments, cwd=folder, log=folder / "log", environment=environment)


def _main(arguments: list[str]) -> int:
    launch.PAUSE_SECONDS = 0.1
    return launch.main(arguments)


def ended(process: BaseProcess, folder: Path) -> int:
    process.join(60)
    assert process.exitcode is not None, (folder / "log").read_text()
    return process.exitcode


def starts(folder: Path, rank: int = 0) -> int:
    return (folder / f"starts-{rank}").stat().st_size


@pytest.mark.parametrize(
    ("program", "restarts", "code", "times"),
    [
        ("sys.exit(0)", "3", 0, 1),
        ("sys.exit(1 if starts == 1 else 0)", "3", 0, 2),  # a lost peer, then all is well
        ("sys.exit(1)", "1", 1, 2),  # no more than that
        ("sys.exit(2)", "3", 2, 1),  # unusable settings
        ("os.kill(os.getpid(), signal.SIGKILL)", "", 128 + signal.SIGKILL, 1),
        # torchrun itself: this rank runs on, and another beside it would write to the same run
        ("os.kill(os.getppid(), signal.SIGKILL)", "3", 128 + signal.SIGKILL, 1),
    ],
)
def test_restarts_and_the_exit_code_are_the_ranks(
    tmp_path: Path, program: str, restarts: str, code: int, times: int
) -> None:
    assert ended(started(tmp_path, program, restarts), tmp_path) == code
    assert starts(tmp_path) == times


def test_unusable_settings_of_one_rank_end_all_without_another_try(tmp_path: Path) -> None:
    process = started(tmp_path, "sys.exit(2) if rank == 1 else time.sleep(60)", "3", processes=2)
    assert ended(process, tmp_path) == 2
    assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (1, 1)


def test_a_stop_reaches_the_ranks_and_nothing_is_started_again(tmp_path: Path) -> None:
    program = """
def stop(number, frame):
    open("stopped", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
open("running", "w").close()
time.sleep(60)
"""
    process = started(tmp_path, program, "3")
    deadline = time.monotonic() + 60
    while not (tmp_path / "running").exists():
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    assert process.pid
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process, tmp_path) == 143
    assert (tmp_path / "stopped").exists()
    assert starts(tmp_path) == 1


@pytest.mark.parametrize("restarts", ["many", "-1", "1.5"])
def test_restarts_that_are_no_number_are_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], restarts: str
) -> None:
    monkeypatch.setenv("RESTARTS", restarts)
    assert launch.main(["train/main.py"]) == 2
    assert restarts in capsys.readouterr().err

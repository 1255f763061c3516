"""A trial's process: watched, stopped, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY

from pipelines import launch, trial
from pipelines.trial import TrialEnd, failure, run_trial

EPOCHS = """
import json, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("stopped in order", flush=True), sys.exit(143)))
for epoch in range(1, 4):
    with open("metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": epoch, "val/accuracy": epoch / 10}) + "\\n")
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trial, "POLL_SECONDS", 0.05)


def run(program: str, on_epoch: Callable[[dict[str, Any]], bool] = lambda row: False) -> TrialEnd:
    with open("lock", "w") as lock:
        command = [sys.executable, "-c", program]
        return run_trial(command, Path("log"), os.environ, Path("metrics.jsonl"), on_epoch, [lock.fileno()])


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_every_epoch_is_seen_once_and_in_order() -> None:
    seen: list[int] = []
    assert run(EPOCHS, lambda row: seen.append(row["epoch"]) or False) == TrialEnd(False, "")
    assert seen == [1, 2, 3]


def test_it_is_stopped_in_order_when_on_epoch_returns_true() -> None:
    ended = run(EPOCHS + "time.sleep(600)", lambda row: row["epoch"] == 2)
    assert ended == TrialEnd(True, "")
    assert "stopped in order" in Path("log").read_text()


def test_one_that_ended_well_before_it_could_be_stopped_was_not_stopped() -> None:
    def after_the_end(row: dict[str, Any]) -> bool:
        number = int(Path("pid").read_text())
        wait_for(
            lambda: not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE
        )
        return bool(row["epoch"] == 3)

    with_pid = "import os\nopen('pid', 'w').write(str(os.getpid()))\n" + EPOCHS
    assert run(with_pid, after_the_end) == TrialEnd(False, "")


def test_one_that_ignores_sigterm_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    stubborn = """
import subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open("child", "w").write(str(child.pid))
"""
    assert run(EPOCHS.replace("for", stubborn + "for") + "time.sleep(600)", lambda row: True).stopped
    wait_for(lambda: not psutil.pid_exists(int(Path("child").read_text())))


def test_an_exception_here_stops_it_too() -> None:
    def ctrl_c(row: dict[str, Any]) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(EPOCHS + "time.sleep(600)", ctrl_c)
    assert "stopped in order" in Path("log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_sigkill_of_the_parent_stops_it_and_the_lock_is_free_only_then() -> None:
    parent = f"""
import os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
import fcntl
from pathlib import Path
from pipelines.trial import run_trial
lock = open("lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
program = {EPOCHS + "open('pid', 'w').write(str(__import__('os').getpid())); time.sleep(600)"!r}
command = [sys.executable, "-c", program]
run_trial(command, Path("log"), os.environ, Path("m"), lambda row: False, [lock.fileno()])
"""
    process = subprocess.Popen([sys.executable, "-c", parent])
    wait_for(lambda: Path("pid").exists() and Path("pid").read_text())
    free = ["flock", "--nonblock", "lock", "true"]
    assert subprocess.run(free, check=False).returncode == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not psutil.pid_exists(int(Path("pid").read_text())))
    assert "stopped in order" in Path("log").read_text()
    assert subprocess.run(free, check=False).returncode == 0


@pytest.mark.parametrize(
    ("printed", "code", "expected"),
    [
        ("error: --data 'x' does not exist\n", 2, "error: --data 'x' does not exist"),
        ("[rank0]: Traceback\n[rank0]:   File x\n[rank0]: ValueError: bad\nlast", 1, "ValueError: bad"),
        ("a.b.OutOfMemoryError: CUDA out\nx.ChildFailedError: y\n", 1, "a.b.OutOfMemoryError: CUDA out"),
        ("error: ours\nTraceback\nRuntimeError: from torchrun\n", 1, "error: ours"),
        ("hello\n", -9, "ended by SIGKILL"),
        ("hello\n", 3, "exit code 3"),
        ("error: of an earlier attempt\n", 0, ""),
    ],
)
def test_the_reason_of_a_failure_is_one_line(printed: str, code: int, expected: str) -> None:
    Path("log").write_text(printed)
    found = failure(code, Path("log"))
    assert found.startswith(expected)
    assert bool(found) == (code != 0)
    assert "\n" not in found


def test_a_failing_command_is_an_error_not_an_exception() -> None:
    ended = run("raise RuntimeError('no memory for 3 images')")
    assert ended == TrialEnd(False, "RuntimeError: no memory for 3 images")

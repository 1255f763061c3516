"""Programs of train, export and serve: started, stopped in order, failing with their exit code."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import launch
from pipelines.launch import program_command, run_program


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "ROOT", tmp_path)


def test_torchrun_starts_several_processes_and_no_single_one() -> None:
    program = str(Path.cwd() / "train/main.py")
    assert program_command("train/main.py", "--epochs", 3) == [sys.executable, program, "--epochs", "3"]
    several = program_command("train/main.py", "--epochs", 3, processes=2)
    assert several[1:3] == ["-m", "torch.distributed.run"]
    assert several[-4:] == ["--nproc_per_node=2", program, "--epochs", "3"]


def test_a_program_whose_caller_is_stopped_ends_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """subprocess.run would kill it, and its snapshot with it."""
    wait = subprocess.Popen.wait

    def stopped(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout is None:
            end = time.monotonic() + 60
            while not Path("ready").exists():
                assert time.monotonic() < end
                time.sleep(0.02)
            raise SystemExit(130)
        return wait(self, timeout)

    program = "import pathlib, signal, sys, time\n"
    program += "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('saved').touch(), sys.exit(143)))\n"
    Path("program.py").write_text(program + "pathlib.Path('ready').touch(); time.sleep(60)")
    monkeypatch.setattr(subprocess.Popen, "wait", stopped)
    with pytest.raises(SystemExit):
        run_program("program.py")
    assert Path("saved").exists()


def test_a_program_that_fails_is_an_error_with_its_code() -> None:
    Path("program.py").write_text("raise SystemExit(3)")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run_program("program.py")
    assert failed.value.returncode == 3

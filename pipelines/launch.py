"""Launcher of the programs of train, export and serve: starts them, and stops them in order."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from serve.contract.errors import UserError
from serve.contract.urls import redact

ROOT = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 90.0  # torchrun gives its workers 30 s of it; a busy machine and MLflow take the rest


def program_command(program: str, *arguments: object, processes: int = 1) -> list[str]:
    """Return the command of `program`, a path like train/main.py; torchrun starts more than one process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = torchrun if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / program), *map(str, arguments)]


def run_program(
    program: str,
    *arguments: object,
    processes: int = 1,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a program to its end, with its output shown; an exception in this process stops it in order.

    Raises:
        CalledProcessError: its exit code is not 0.
    """
    command = program_command(program, *arguments, processes=processes)
    # without it torchrun sets 1 too, and explains that in a paragraph; training sets its own threads
    threads = {"OMP_NUM_THREADS": "1"} if processes > 1 else {}
    process = subprocess.Popen(command, env={**threads, **(environment or os.environ)})
    try:
        code = process.wait()
    finally:
        stop(process)
    if code:
        raise subprocess.CalledProcessError(code, command)


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before and after `--`."""
    divider = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:divider]), list(arguments[divider + 1 :])


def exit_code_of(work: Callable[[], None]) -> int:
    """Do the work, print its error, and return 0, 2 for a UserError or a failed program's exit code."""
    try:
        work()
    except (UserError, OSError) as error:
        print(f"error: {redact(error)}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: this step failed: {redact(' '.join(map(str, error.cmd)))}", file=sys.stderr)
        return int(error.returncode)
    return 0


def stop(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM, on which training ends its MLflow run as KILLED; then SIGKILL to whatever is left."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for member in family:  # torchrun's workers are in sessions of their own
        with suppress(psutil.NoSuchProcess):
            member.kill()

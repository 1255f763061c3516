"""Trial process: one training run, watched through its metrics.jsonl and stopped by SIGTERM."""

import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.launch import stop
from train.signals import stop_with_parent
from train.tracking.base import read_metrics

POLL_SECONDS = 0.25

EXCEPTION = re.compile(r"([\w.]+\.)?\w*(Error|Exception|Interrupt)\b")
RANK = re.compile(r"^\[\w+\d+\]:\s?")  # torchrun's prefix of a worker's line


@dataclass(frozen=True)
class TrialEnd:
    stopped: bool
    """By `on_epoch`."""
    error: str
    """One line; empty if the process succeeded."""


def run_trial(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    metrics: Path,
    on_epoch: Callable[[dict[str, Any]], bool],
    keep_open: Sequence[int],
) -> TrialEnd:
    """Run a command to its end, or until `on_epoch`, called for each row of `metrics`, returns True.

    An exception in this process stops it in order, and so does SIGKILL (Linux).

    Args:
        keep_open: file descriptors that it inherits, such as that of a lock.
    """
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            pass_fds=keep_open,
            start_new_session=True,  # Ctrl-C reaches only this process, which then stops the trial
            preexec_fn=stop_with_parent,
        )
    seen = 0
    try:
        while True:
            running = process.poll() is None  # first: no row can follow the last read
            rows = read_metrics(metrics)
            for row in rows[seen:]:
                if on_epoch(row) and process.poll() is None:
                    return TrialEnd(True, "")
            seen = len(rows)
            if not running:
                return TrialEnd(False, failure(process.returncode, log))
            try:
                process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
    finally:
        stop(process)


def failure(code: int, log: Path) -> str:
    """Return why a process failed: its last line with an error of ours, else its last exception."""
    if code == 0:
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [RANK.sub("", line).strip() for line in lines]
    ours = [line for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if EXCEPTION.match(line) and "ChildFailedError" not in line]
    if ours or raised:
        return (ours or raised)[-1][:300]
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"exit code {code}; it printed nothing that looks like an error"

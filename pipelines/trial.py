"""One training run as a process of its own: watched through its metrics.jsonl, stopped by SIGTERM."""

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
RANK = re.compile(r"^\[\w+\d+\]:\s?")  # torchrun's mark of a worker's line


@dataclass(frozen=True)
class Ended:
    stopped: bool
    """By `on_epoch`."""
    error: str
    """Empty when it ended well; else one line."""


def run_trial(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    metrics: Path,
    on_epoch: Callable[[dict[str, Any]], bool],
    keep_open: Sequence[int],
) -> Ended:
    """Run to the end, or until `on_epoch`, called once for each row of `metrics`, returns True.

    An exception, Ctrl-C too, stops the process before it goes on. SIGKILL of this process sends the other
    SIGTERM (Linux). The file descriptors `keep_open` stay open in it: a lock that lasts as long as both.
    """
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            pass_fds=keep_open,
            start_new_session=True,  # Ctrl-C reaches us alone; we stop it in order
            preexec_fn=stop_with_parent,
        )
    seen = 0
    try:
        while True:
            running = process.poll() is None  # asked before reading: no row can come after the last look
            rows = read_metrics(metrics)
            for row in rows[seen:]:
                if on_epoch(row) and process.poll() is None:
                    stop(process)
                    return Ended(True, "")
            seen = len(rows)
            if not running:
                return Ended(False, failure(process.returncode, log))
            try:
                process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
    finally:
        stop(process)


def failure(code: int, log: Path) -> str:
    """Why it failed, from what it printed: our own error line, else the last exception's."""
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

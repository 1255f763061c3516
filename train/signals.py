"""Signals that stop a run: SIGTERM (a cluster's preemption, torchrun), SIGINT (Ctrl-C), SIGHUP (the
terminal or the connection to it is gone)."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

EXIT_CODE = 128 + signal.SIGTERM  # of a rank that stopped in order; torchrun makes 1 of it

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SECONDS_TO_INSIST = 5.0  # Ctrl-C reaches ranks twice: from the terminal and from torchrun
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # opened now: no allocation after a fork


class Preempted(Exception):  # noqa: N818, nothing went wrong
    """All ranks have agreed to stop."""


class StopRequest:
    """The signal that this process got: polled at each training step, the end of the process elsewhere."""

    def __init__(self) -> None:
        self.received = 0
        """The signal's number."""
        self.polled = False
        """The trainer looks at `received`; a signal raises nothing."""
        self.agent = os.getppid()
        self.ending = False
        """The process ends already; a signal raises nothing."""
        self.since = 0.0
        self.lost_peer = False
        """Another rank of this machine had ended when the signal came: torchrun sent it for that."""
        self.began = False
        """The run has begun to train."""
        self.advice: Callable[[], str] = str
        """Returns how to resume the run; "" until it has a folder."""

    def install(self) -> None:
        for number in stops():
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = bool(self.received)
        insisted = number == signal.SIGINT and time.monotonic() - self.since > SECONDS_TO_INSIST
        if not again:
            self.received, self.since = number, time.monotonic()
            self.lost_peer = number == signal.SIGTERM and not self.ending and has_lost_peer(self.agent)
        if not (self.polled or self.ending) or (again and insisted):
            self.ending = True
            raise KeyboardInterrupt

    @property
    def requested(self) -> bool:
        """Somebody wants this job to end, and not only this rank."""
        return bool(self.received) and not self.lost_peer


def stops() -> list[signal.Signals]:
    """Return the signals that end a command: not SIGHUP where nohup has it ignored."""
    hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [number for number in STOPS if hangs_up or number != signal.SIGHUP]


class Unbreakable:
    """A stream to which writing never fails: a reader that is gone must not stop a run."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def ignore_broken_pipes() -> None:
    """Keep running when a terminal hangs up, or a `| tee` ends."""
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)


def ignore_stops(worker: int) -> None:
    """Ignore the signals in a loader process: its rank ends it when it has what it needs."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def has_lost_peer(agent: int) -> bool:
    """Return whether a rank that torchrun, process `agent`, started beside this one has ended."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks == 1 or "TORCHELASTIC_RUN_ID" not in os.environ or os.getppid() != agent:
        return False
    import psutil  # late: signals are handled before the imports that take time

    with suppress(psutil.Error):
        children = psutil.Process(agent).children()
        return len([c for c in children if c.status() != psutil.STATUS_ZOMBIE]) < ranks
    return False


def stop_with_agent() -> None:
    """Have this rank stop as if preempted when torchrun is killed with SIGKILL (Linux), so that it does not
    train beside the ranks of a new start."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    agent = os.getppid()
    stop_with_parent()
    if os.getppid() != agent:  # it ended in between
        raise KeyboardInterrupt


def stop_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent ends, however that ends (Linux only)."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

"""Being told to stop: SIGTERM (a cluster's preemption, torchrun), SIGINT (Ctrl-C), SIGHUP (the terminal or
the connection to it is gone)."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

EXIT_CODE = 128 + signal.SIGTERM
"""Of a rank that was told to stop and did so in order. torchrun makes 1 of it."""

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SECONDS_TO_INSIST = 5.0  # Ctrl-C reaches ranks twice: from the terminal and from torchrun
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Preempted(Exception):  # noqa: N818, nothing went wrong
    """All ranks have agreed to stop here."""


class StopRequest:
    """Notes a signal, for the ranks to agree on at their next step; elsewhere it ends the process."""

    def __init__(self) -> None:
        self.received = 0
        self.noted = False
        """Signals are noted; the one who sets it looks at `received`."""
        self.agent = os.getppid()
        self.ending = False
        """The process ends already: what it still has to do is not interrupted once more."""
        self.since = 0.0
        self.lost_peer = False
        """Another rank of this machine had ended when the signal came: torchrun sent it for that."""
        self.began = False
        """The run has begun to train."""
        self.advice: Callable[[], str] = str
        """How to resume the run, once it is known which; until then ""."""

    def install(self) -> None:
        for number in stops():
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = bool(self.received)
        insisted = number == signal.SIGINT and time.monotonic() - self.since > SECONDS_TO_INSIST
        if not again:
            self.received, self.since = number, time.monotonic()
            self.lost_peer = number == signal.SIGTERM and not self.ending and has_lost_peer(self.agent)
        if not (self.noted or self.ending) or (again and insisted):
            self.ending = True
            raise KeyboardInterrupt

    @property
    def told(self) -> bool:
        """Somebody wants this job to end."""
        return bool(self.received) and not self.lost_peer


def stops() -> list[signal.Signals]:
    """Return the signals that end a command: not SIGHUP where nohup has it ignored."""
    hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [number for number in STOPS if hangs_up or number != signal.SIGHUP]


class Unbreakable:
    """A stream to which writing never fails: nobody may be reading any more, and that must stop no run."""

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


def outlive_readers() -> None:
    """Of standard output and error: a terminal that hangs up, a `| tee` that ends with it."""
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)


def ignore_stops(worker: int) -> None:
    """For loader processes: the rank that started them ends them when it has what it needs."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def has_lost_peer(agent: int) -> bool:
    """Return whether a rank that torchrun, process `agent`, started beside this one has ended."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks == 1 or "TORCHELASTIC_RUN_ID" not in os.environ or os.getppid() != agent:
        return False
    import psutil  # which the first line of a program need not wait for

    with suppress(psutil.Error):
        children = psutil.Process(agent).children()
        return len([c for c in children if c.status() != psutil.STATUS_ZOMBIE]) < ranks
    return False


def end_with_agent() -> None:
    """When torchrun is killed with SIGKILL, have its ranks stop as if preempted (Linux), so that they do
    not train on beside those of a new start."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    agent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != agent:  # it went in between
        raise KeyboardInterrupt

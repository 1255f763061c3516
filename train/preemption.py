"""Being told to stop: SIGTERM (a cluster's preemption, torchrun) and SIGINT (Ctrl-C)."""

import ctypes
import os
import signal
import sys
import time
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
"""Of a rank that was told to stop and did so in order; the same command goes on. torchrun makes 1 of it."""

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
        self.since = 0.0

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        insisted = number == signal.SIGINT and time.monotonic() - self.since > SECONDS_TO_INSIST
        if not self.noted or (self.received and insisted):
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.since = number, time.monotonic()


def ignore_stops(worker: int) -> None:
    """For loader processes: the rank that started them ends them when it has what it needs."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_with_agent() -> None:
    """When torchrun is killed with SIGKILL, have its ranks stop as if preempted (Linux), so that they do
    not train on beside those of a new start."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    agent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != agent:  # it went in between
        raise KeyboardInterrupt

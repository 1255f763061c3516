"""torchrun that is started again when a rank was lost, and ends with the exit code of the rank that failed.

    RESTARTS=20 python -m train.launch TORCHRUN_FLAGS train/main.py FLAGS

For containers on several nodes, where --max-restarts must be 0: the agents of all nodes end when a rank is
lost, start anew and meet anew, while the pods stay. RESTARTS is how often at most; unset, never.

Exit code: 0 done; 2 unusable settings or data, which is not tried again; 143 stopped by SIGTERM, which all
ranks got; otherwise the rank's own (128 + N if signal N killed it), after RESTARTS restarts. Where torchrun
itself was killed, its ranks may still run: nothing is started beside them, 128 + N ends the container.
"""

import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not train/, belongs on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from serve.contract.installation import require

require("train", "torch")

import os
import signal
import time
import traceback
from collections.abc import Sequence
from types import FrameType

PAUSE_SECONDS = 3.0  # in which the agents of the other nodes notice, too
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Return torchrun's exit code, in the process that watches and in each that it starts."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    restarts = os.environ.get("RESTARTS") or "0"
    if not restarts.isdecimal():
        print(f"error: RESTARTS {restarts!r} must be a whole number of 0 or more", file=sys.stderr)
        return 2
    watcher, allowed = Watcher(), int(restarts)
    for restart in range(allowed + 1):
        if watcher.start() == 0:
            return torchrun(arguments)
        code = watcher.wait()
        if code in (0, 2) or watcher.stopped or watcher.killed or restart == allowed:
            break
        print(
            f"torchrun ended with exit code {code}: restart {restart + 1} of {allowed}",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(PAUSE_SECONDS)
        if watcher.stopped:
            break
    return code


class Watcher:
    """One child process at a time, which gets the signals of this one."""

    def __init__(self) -> None:
        self.stopped = False
        self.killed = False
        self.child = 0

    def start(self) -> int:
        """Return 0 in a new process, and its number in this one. No signal is lost in between."""
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        self.child = os.fork()
        for number in FORWARDED:
            signal.signal(number, self.forward if self.child else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        return self.child

    def wait(self) -> int:
        """Return the child's exit code, or 128 + the number of the signal that killed it."""
        _, status = os.waitpid(self.child, 0)
        self.child = 0
        code = os.waitstatus_to_exitcode(status)
        self.killed = code < 0
        return code if code >= 0 else 128 - code

    def forward(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self.child:
            os.kill(self.child, number)


def torchrun(arguments: Sequence[str]) -> int:
    """Run torchrun in this process; it makes 1 of all codes but 0, this returns the rank's own."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    try:
        run(list(arguments))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if 2 in codes:
            return 2  # the rank has printed why
        traceback.print_exception(error, limit=0)
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How a process ends that was stopped or has lost another one: what it prints, and its exit code."""

import os
import signal
import sys
import time
from typing import NoReturn

from train.data.workers import is_fetching, kill_workers
from train.distributed import Ranks
from train.signals import EXIT_CODE, StopRequest

LET_THE_CAUSE_BE_SEEN_SECONDS = 1.0  # torchrun looks ten times a second, and names who ended first


def give_up(ranks: Ranks, error: RuntimeError, stop: StopRequest) -> None:
    """End one line after another rank did, so that its traceback is what is seen first."""
    if stop.told:
        stopped(ranks, stop)
    else:
        reason = str(error).splitlines()[0][:200]
        print(f"rank {ranks.rank} lost contact to another rank, which has the cause: {reason}", flush=True)
        if ranks.is_main and not restarts_left():
            print(stop.advice(), flush=True)
        time.sleep(LET_THE_CAUSE_BE_SEEN_SECONDS)
    leave(EXIT_CODE if stop.told else 1, at_once=True)  # the group's end could wait for the lost one


def stopped(ranks: Ranks, stop: StopRequest) -> int:
    """Print why this process ends, once for the job; its exit code."""
    cause = signal.Signals(stop.received).name if stop.received else "a signal to another rank"
    if stop.lost_peer:
        print(f"rank {ranks.rank} is ended because another rank ended, which has the cause", flush=True)
    elif ranks.is_main:
        print(f"stopped by {cause}", file=sys.stderr)
    if ranks.is_main and not (stop.lost_peer and restarts_left()):
        print(stop.advice() or "it had not begun to train", file=sys.stderr, flush=True)
    return 1 if stop.lost_peer else EXIT_CODE


def restarts_left() -> bool:
    """Return whether torchrun starts all ranks again when one has failed (--max-restarts)."""
    get = os.environ.get
    return int(get("TORCHELASTIC_RESTART_COUNT", "0")) < int(get("TORCHELASTIC_MAX_RESTARTS", "0"))


def leave(code: int, at_once: bool = False) -> NoReturn:
    """End this process; at once if a thread is stuck in reading, which the interpreter would wait for."""
    if not at_once and not is_fetching():
        sys.exit(code)
    kill_workers()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""The end of a process: the status of its run, what it prints, and its exit code."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from serve.contract.errors import UserError
from serve.contract.files import FULL
from serve.contract.urls import redact
from train.data.workers import first_line, is_fetching, kill_workers
from train.distributed import Ranks, lost_contact
from train.engine.run import TrainingRun
from train.runs.directory import write_status
from train.signals import EXIT_CODE, Preempted, StopRequest
from train.tracking.base import NullTracker

CAUSE_FIRST_SECONDS = 1.0  # torchrun looks ten times a second, and names the rank that ended first
ALONE_SECONDS = 10.0  # in which torchrun ends this rank if another one has ended with the same error


@contextmanager
def recorded_status(
    run: TrainingRun, folder: Path, tracker: NullTracker, stop: StopRequest
) -> Iterator[None]:
    """Record in the run directory and in the tracker that the run trains, and how that ends."""

    def record(status: str) -> None:
        try:
            if run.ranks.is_main:
                write_status(folder, status)
        except OSError as error:
            print(f"warning: the status {status} of the run was not written: {error}", flush=True)

    record("RUNNING")
    stop.began, status = True, "FAILED"
    try:
        yield
        status = "FINISHED" if run.history.complete(run.config) else "KILLED"
    except (KeyboardInterrupt, Preempted):  # also when torchrun ended the ranks that were left
        status = "FAILED" if stop.lost_peer else "KILLED"
        raise
    except RuntimeError as error:
        if stop.requested and lost_contact(error):  # to ranks that ended sooner
            status = "KILLED"
        raise
    finally:
        record(status)
        tracker.end(status)


@contextmanager
def exit_with_code(ranks: Ranks, stop: StopRequest) -> Iterator[None]:
    """End the process with 2 after an error for the user, with 1 on a full disk, with EXIT_CODE after a
    signal; print why."""
    try:
        yield
    except (UserError, FloatingPointError, OSError) as error:
        full = isinstance(error, OSError)
        if full and getattr(error, "errno", None) not in FULL:
            raise
        stop.ending = True
        if reports_error(ranks, stop):
            rank = "" if ranks.is_main else f" (rank {ranks.rank})"
            cure = "; make room on that disk, or give another --output" if full else ""
            print(f"error{rank}: {redact(error)}{cure}", file=sys.stderr, flush=True)
            if stop.began and not isinstance(error, FloatingPointError):
                print(f"then {stop.advice()}", file=sys.stderr, flush=True)
        leave(1 if full else 2)
    except (KeyboardInterrupt, Preempted):
        stop.ending = True
        leave(report_stop(ranks, stop))


@contextmanager
def exit_after_bug() -> Iterator[None]:
    """End the process with 1 and a traceback after an unexpected error that left its process group open."""
    try:
        yield
    except Exception:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        leave(1)


def reports_error(ranks: Ranks, stop: StopRequest) -> bool:
    """Return whether this rank prints its error: a machine's first rank does, and one that has it alone.

    If all have it, torchrun ends the others as soon as the first has ended.
    """
    deadline = time.monotonic() + ALONE_SECONDS
    while ranks.local_rank and not stop.received and time.monotonic() < deadline:
        time.sleep(0.05)
    return not stop.received or not ranks.local_rank


@contextmanager
def while_in_contact(ranks: Ranks, stop: StopRequest) -> Iterator[None]:
    """End the process when another rank is gone, one line after it, so that its traceback is seen first."""
    try:
        yield
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        if stop.requested:
            report_stop(ranks, stop)
        else:
            found = f"rank {ranks.rank} lost contact to another rank, see its output"
            print(f"{found}: {first_line(error)}", flush=True)
            if ranks.is_main and not restarts_left():
                print(stop.advice(), flush=True)
            time.sleep(CAUSE_FIRST_SECONDS)
        leave(EXIT_CODE if stop.requested else 1)


def report_stop(ranks: Ranks, stop: StopRequest) -> int:
    """Print why this process stops, once for the job, and return its exit code."""
    cause = signal.Signals(stop.received).name if stop.received else "a signal to another rank"
    if stop.lost_peer:
        print(f"rank {ranks.rank} ends because another rank ended, see its output", flush=True)
    elif ranks.is_main:
        print(f"stopped by {cause}", file=sys.stderr)
    if ranks.is_main and not (stop.lost_peer and restarts_left()):
        print(stop.advice() or "training had not begun", file=sys.stderr, flush=True)
    return 1 if stop.lost_peer else EXIT_CODE


def restarts_left() -> bool:
    """Return whether torchrun starts all ranks again when one has failed (--max-restarts)."""
    get = os.environ.get
    return int(get("TORCHELASTIC_RESTART_COUNT", "0")) < int(get("TORCHELASTIC_MAX_RESTARTS", "0"))


def leave(code: int) -> NoReturn:
    """End this process; at once if the interpreter would wait: for a thread that is stuck in reading, or
    for the other ranks of a process group that is open after an error."""
    if not is_fetching() and not dist.is_initialized():
        sys.exit(code)
    kill_workers()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

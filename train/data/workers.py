"""Loader processes: how many fit into shared memory, how to wait for them, and what their end means."""

import errno
import multiprocessing.queues
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from train.config import TrainConfig
from train.distributed import Ranks
from train.signals import ignore_stops

T = TypeVar("T")
SHARED_MEMORY = Path("/dev/shm")
USABLE = 0.9  # share of the free shared memory that batches may take
PREFETCH = 2  # batches that each loader process is ahead by, torch's own default
HELD = 2  # by the training process: the batch it works on and the one that has just come
SMALL_TENSORS = 3 * 4096  # bytes of shared memory: a page for each of a batch's labels, weights and indices
OPEN_FILES = 4096  # each batch on its way takes four
POLL_SECONDS = 1.0
NO_HANDOVER = 76  # exit code of a loader process whose batch cannot be sent

Answer = tuple[list[T], BaseException | None]
_fetching: set[Any] = set()  # the queues of those threads that are at an item


def fit_workers(
    config: TrainConfig, ranks: Ranks, num_workers: int, num_train: int, num_val: int
) -> tuple[int, str]:
    """As many of the loader processes as have room for their batches in shared memory, and a warning if
    these are fewer. Call on all ranks of a machine, before any of them loads."""
    if num_workers == 0 or sys.platform != "linux":
        return num_workers, ""
    usable = os.access(SHARED_MEMORY, os.W_OK | os.X_OK)
    free = shutil.disk_usage(SHARED_MEMORY).free if usable else 0

    def need(workers: int) -> int:
        return ranks.local_world_size * bytes_in_flight(config, ranks, workers, num_train, num_val)

    fitting = num_workers
    while fitting and need(fitting) > USABLE * free:
        fitting -= 1
    if fitting == num_workers:
        return num_workers, ""
    return fitting, (
        f"warning: {num_workers} loader processes for each of {ranks.local_world_size} ranks need "
        f"{need(num_workers) / 1e6:,.0f} MB of shared memory, and {SHARED_MEMORY} has {free / 1e6:,.0f} MB "
        f"free: {fitting} are used, which may be slower. Enlarge it (docker run --shm-size=2g; in "
        f"Kubernetes an emptyDir of medium Memory mounted at {SHARED_MEMORY}) or lower --batch-size"
    )


def bytes_in_flight(config: TrainConfig, ranks: Ranks, workers: int, num_train: int, num_val: int) -> int:
    """The most that one rank's batches of training, or of validation, take in shared memory at a time."""
    batches = PREFETCH * workers + HELD
    in_pass = config.batch_size // (ranks.world_size * config.accumulation)
    side = config.preprocess().size
    train_side = max(config.input_size(config.image_size), side if config.retune_epochs else 0)
    most_train = -(-num_train // config.batch_size) * config.accumulation * in_pass  # in a whole epoch
    most_val = -(-num_val // ranks.world_size)
    train = min(batches * in_pass, most_train) * train_side**2 * 3
    val = min(batches * 2 * in_pass, most_val) * side**2 * 3
    return max(train, val) + batches * SMALL_TENSORS


def allow_open_files() -> None:
    """Raise the soft limit of open files, often 256 or 1024, as far as the hard one lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def begin_worker(worker: int) -> None:
    """First call in a loader process."""
    ignore_stops(worker)
    queue: Any = multiprocessing.queues.Queue
    queue._on_queue_feeder_error = staticmethod(_end_worker)


def _end_worker(error: Exception, batch: object) -> None:
    """End the process whose batch cannot be sent: by default it only prints, and the batch is awaited for
    ever. The training process notices the end at once."""
    print(f"loader process {os.getpid()}: {_first_line(error)}", file=sys.stderr, flush=True)
    os._exit(NO_HANDOVER)


def explained(error: Exception, exit_codes: Collection[int]) -> str | None:
    """What an error that torch's loader raised means, given the exit codes of those of its processes that
    have ended; None when it is not about them."""
    text = str(error)
    if "Too many open files" in text or "ancillary data" in text:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"loading needs more open files than the {most} that a process may have: raise the limit "
            "(ulimit -n), or give a smaller --num-workers"
        )
    free = shutil.disk_usage(SHARED_MEMORY).free / 1e6 if SHARED_MEMORY.exists() else 0.0
    shared = (
        f"shared memory ({SHARED_MEMORY}, {free:,.0f} MB free) is full: enlarge it (docker run "
        "--shm-size=2g; in Kubernetes an emptyDir of medium Memory), or give a smaller --num-workers"
    )
    if getattr(error, "errno", None) == errno.ENOSPC and free < 1:  # when a loader process is started
        return f"loader processes cannot be started: {shared}"
    if not re.search(r"DataLoader worker \(pid", text):
        return None
    if NO_HANDOVER in exit_codes:
        return (
            f"a loader process could not hand over its batch, for the reason that it printed above. Most "
            f"often {shared}"
        )
    if -signal.SIGBUS in exit_codes:
        return f"a loader process died of a bus error: {shared}"
    if -signal.SIGKILL in exit_codes:
        return (
            "a loader process was killed (SIGKILL), as the kernel does when memory runs out (dmesg tells): "
            "give a smaller --num-workers or --batch-size, or more memory"
        )
    return f"a loader process died: {_first_line(error)}; --num-workers 0 loads without them"


def in_thread(items: Iterator[T], while_waiting: Callable[[float], None]) -> Iterator[T]:
    """Yield the same items, each fetched in a thread, so that this one can be stopped while an item does
    not come: once a second it calls `while_waiting`, which may raise, with the seconds since it asked."""
    wanted: SimpleQueue[bool] = SimpleQueue()
    fetched: SimpleQueue[Answer[T]] = SimpleQueue()

    def fetch() -> None:
        while wanted.get():
            _fetching.add(fetched)
            try:
                answer: Answer[T] = [next(items)], None
            except StopIteration:
                answer = [], None
            except BaseException as error:
                answer = [], error
            _fetching.discard(fetched)
            fetched.put(answer)
            del answer  # or an error would keep this frame, and the loader processes, in a circle

    def wait() -> Answer[T]:
        asked = time.monotonic()
        while True:
            try:
                return fetched.get(timeout=POLL_SECONDS)
            except Empty:
                while_waiting(time.monotonic() - asked)

    Thread(target=fetch, name="batches", daemon=True).start()
    try:
        while True:
            wanted.put(True)
            item, error = wait()
            if error is not None:
                raise error
            if not item:
                return
            yield item.pop()
    finally:
        error = None  # it keeps this frame
        wanted.put(False)


def is_fetching() -> bool:
    """Return whether a thread still waits for a batch, as the end of the interpreter might do for ever."""
    return bool(_fetching)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]

"""Workers: processes and threads that load images, how many have room, and what their end means."""

import errno
import multiprocessing.queues
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from train.config import TrainConfig
from train.distributed import Ranks
from train.signals import ignore_stops

T = TypeVar("T")
SHARED_MEMORY = Path("/dev/shm")
USABLE = 0.9  # share of the free shared memory that batches may take
PREFETCH = 2  # batches that each worker is ahead by, torch's own default
HELD = 2  # by the training process: the batch it works on and the one that has just come
SMALL_TENSORS = 3 * 4096  # bytes of shared memory: a page for each of a batch's labels, weights and indices
OPEN_FILES = 4096  # each batch on its way takes four
POLL_SECONDS = 1.0
CANNOT_SEND = 76  # exit code of a worker whose batch cannot be sent

_fetches: WeakSet[Future[Any]] = WeakSet()


def fit_workers(config: TrainConfig, ranks: Ranks, num_workers: int, num_train: int, num_val: int) -> int:
    """Return how many of each rank's workers have room for their batches in shared memory; warn once a
    machine if these are fewer. Call on all ranks of a machine, before any of them loads."""
    if num_workers == 0 or sys.platform != "linux":
        return num_workers
    usable = os.access(SHARED_MEMORY, os.W_OK | os.X_OK)
    free = shutil.disk_usage(SHARED_MEMORY).free if usable else 0

    def need(workers: int) -> int:
        return ranks.local_world_size * bytes_in_flight(config, ranks, workers, num_train, num_val)

    fitting = num_workers
    while fitting and need(fitting) > USABLE * free:
        fitting -= 1
    if fitting < num_workers and ranks.local_rank == 0:
        print(
            f"warning: --num-workers {num_workers} on {ranks.local_world_size} ranks needs "
            f"{need(num_workers) / 1e6:,.0f} MB of shared memory, and {SHARED_MEMORY} has "
            f"{free / 1e6:,.0f} MB free: {fitting} are used, which may be slower. Enlarge it (docker run "
            f"--shm-size=2g; in Kubernetes an emptyDir of medium Memory mounted at {SHARED_MEMORY}) or "
            "lower --batch-size",
            flush=True,
        )
    return fitting


def bytes_in_flight(config: TrainConfig, ranks: Ranks, workers: int, num_train: int, num_val: int) -> int:
    """Return the most shared memory that one rank's batches of training or validation take at a time."""
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
    """Raise the soft limit of open files, often 256 or 1024, as far as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def init_worker(worker: int) -> None:
    """Prepare a worker process; a DataLoader's worker_init_fn."""
    ignore_stops(worker)
    queue: Any = multiprocessing.queues.Queue
    queue._on_queue_feeder_error = staticmethod(_end_worker)


def _end_worker(error: Exception, batch: object) -> None:
    """End the worker whose batch cannot be sent, which the training process notices at once. By default it
    would print the error, and training would wait for the batch for ever."""
    print(f"loader process {os.getpid()}: {first_line(error)}", file=sys.stderr, flush=True)
    os._exit(CANNOT_SEND)


def kill_workers() -> None:
    """End all workers at once, also those that are stuck."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their end as an error
    for child in multiprocessing.active_children():
        child.kill()


def explain(error: Exception, exit_codes: Collection[int]) -> str | None:
    """Return what an error that torch's DataLoader raised means and what to do; None for other errors.

    Args:
        exit_codes: of the workers that have ended.
    """
    text = str(error)
    if "Too many open files" in text or "ancillary data" in text:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"loading needs more open files than the {most} that a process may have: raise the limit "
            "(ulimit -n), or lower --num-workers"
        )
    free = shutil.disk_usage(SHARED_MEMORY).free / 1e6 if SHARED_MEMORY.exists() else 0.0
    full = (
        f"shared memory ({SHARED_MEMORY}, {free:,.0f} MB free) is full: enlarge it (docker run "
        "--shm-size=2g; in Kubernetes an emptyDir of medium Memory), or lower --num-workers"
    )
    if getattr(error, "errno", None) == errno.ENOSPC and free < 1:  # when a worker is started
        return f"loader processes cannot be started: {full}"
    if not re.search(r"DataLoader worker \(pid", text):
        return None
    causes = {
        CANNOT_SEND: f"could not send its batch, for the reason printed above. Most often {full}",
        -signal.SIGBUS: f"died of a bus error: {full}",
        -signal.SIGKILL: "was killed, as the kernel does when memory runs out (dmesg): lower --num-workers "
        "or --batch-size, or add memory",
    }
    unknown = f"died: {first_line(error)}; --num-workers 0 loads without them"
    cause = next((text for code, text in causes.items() if code in exit_codes), unknown)
    return f"a loader process {cause}"


def first_line(error: Exception) -> str:
    """Return what an error is about, in one line of at most 300 characters."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def fetch_in_thread(items: Iterator[T], while_waiting: Callable[[float], None]) -> Iterator[T]:
    """Yield the same items, each fetched in another thread, so that waiting for it can end.

    Args:
        while_waiting: called once a second with the seconds that an item has taken; may raise.
    """
    pool = ThreadPoolExecutor(1, "batches")
    fetch: Future[list[T]] | None = None
    try:
        while True:
            fetch = pool.submit(lambda: list(islice(items, 1)))
            _fetches.add(fetch)
            started = time.monotonic()
            while not wait([fetch], POLL_SECONDS).done:
                while_waiting(time.monotonic() - started)
            item = fetch.result()
            if not item:
                return
            yield item.pop()  # the consumer alone holds it
    finally:
        fetch = None  # an error in it would keep this frame and the worker processes alive
        pool.shutdown(wait=False)


def is_fetching() -> bool:
    """Return whether a thread still waits for an item; the end of the interpreter would wait for it."""
    return any(not fetch.done() for fetch in _fetches)


def map_in_threads(function: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """Return list(map(function, items)), computed by as many threads as torch has, which is one in workers;
    for functions that release the interpreter's lock most of the time, such as decoding."""
    threads = torch.get_num_threads()
    if threads == 1:
        return list(map(function, items))
    return list(_pool(threads).map(function, items))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="pixels")

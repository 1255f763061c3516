"""Workers fit into shared memory, can be stopped while they are waited for, and their end is explained."""

import errno
import gc
import multiprocessing.queues
import resource
import signal
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from threading import Event
from typing import Any

import pytest
import torch

from train.config import TrainConfig
from train.data import workers
from train.data.workers import (
    allow_open_files,
    bytes_in_flight,
    explain,
    fetch_in_thread,
    fit_workers,
    init_worker,
    map_in_threads,
)
from train.distributed import Ranks

Usage = namedtuple("Usage", "total used free")
ONE, MANY = Ranks(), 10**6
CONFIG = TrainConfig(image_size=224, batch_size=128)


def fit(monkeypatch: pytest.MonkeyPatch, megabytes: float, *arguments: Any) -> int:
    free = int(megabytes * 1e6)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: Usage(free, 0, free))
    monkeypatch.setattr(workers.os, "access", lambda path, mode: True)
    return fit_workers(*arguments)


def test_batches_of_training_and_of_validation_which_are_twice_as_large_are_counted() -> None:
    image = 224 * 224 * 3
    assert bytes_in_flight(CONFIG, ONE, 4, MANY, 10) == pytest.approx(10 * 128 * image, rel=0.01)
    assert bytes_in_flight(CONFIG, ONE, 4, MANY, MANY) == pytest.approx(20 * 128 * image, rel=0.01)
    four = Ranks(0, 0, 4, 4)
    assert bytes_in_flight(CONFIG, four, 4, MANY, MANY) == pytest.approx(5 * 128 * image, rel=0.01)


def test_there_are_no_more_batches_than_images() -> None:
    """A small data set needs no more than it has, however many processes load it."""
    image = 224 * 224 * 3
    assert bytes_in_flight(CONFIG, ONE, 64, 200, 30) < 1.1 * 256 * image
    assert bytes_in_flight(CONFIG, ONE, 64, 200, 400) < 1.1 * 400 * image


@pytest.mark.parametrize(
    ("megabytes", "ranks", "expected"),
    [(10_000, 1, 4), (430, 1, 4), (420, 1, 3), (64, 1, 0), (200, 1, 1), (430, 4, 4)],
)
def test_what_does_not_fit_into_shared_memory_is_not_started(
    monkeypatch: pytest.MonkeyPatch,
    megabytes: float,
    ranks: int,
    expected: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """64 MB is what containers have; a batch of 128 images of 224 pixels is 19 MB, of validation 39 MB."""
    arguments = (CONFIG, Ranks(0, 0, ranks, ranks), 4, MANY, MANY)
    assert fit(monkeypatch, megabytes, *arguments) == expected
    warning = capsys.readouterr().out
    assert bool(warning) == (expected < 4)
    if warning:
        assert f"{megabytes:,.0f} MB" in warning
        assert "--shm-size" in warning


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines of one rank each need half of what one of two needs."""
    together = fit(monkeypatch, 250, CONFIG, Ranks(0, 0, 2, 2), 4, MANY, MANY)
    apart = fit(monkeypatch, 250, CONFIG, Ranks(0, 0, 2, 1), 4, MANY, MANY)
    assert (together, apart) == (1, 4)


def test_without_shared_memory_images_are_loaded_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.os, "access", lambda path, mode: False)
    assert fit_workers(CONFIG, ONE, 2, MANY, MANY) == 0
    assert fit_workers(CONFIG, ONE, 0, MANY, MANY) == 0


@pytest.mark.parametrize(
    ("limits", "expected"), [((256, 1024), 1024), ((256, -1), 4096), ((9000, 9000), 0)]
)
def test_the_limit_of_open_files_is_raised_as_far_as_is_allowed(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], expected: int
) -> None:
    changed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: changed.append(new))
    allow_open_files()
    assert changed == ([(expected, limits[1])] if expected else [])


def test_a_batch_that_cannot_be_sent_ends_its_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default its sender prints a traceback and the batch is awaited for ever."""
    ended: list[int] = []
    monkeypatch.setattr(workers, "ignore_stops", lambda worker: None)
    monkeypatch.setattr(multiprocessing.queues.Queue, "_on_queue_feeder_error", None)
    monkeypatch.setattr(workers.os, "_exit", ended.append)
    init_worker(0)
    queue: Any = multiprocessing.queues.Queue
    queue._on_queue_feeder_error(OSError(errno.ENOSPC, "No space left on device"), None)
    assert ended == [workers.CANNOT_SEND]
    assert "No space left on device" in capsys.readouterr().err


DIED = "DataLoader worker (pid(s) 7) exited unexpectedly"


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        (DIED, workers.CANNOT_SEND, "/dev/shm"),
        (DIED, -signal.SIGBUS, "/dev/shm"),
        (DIED, -signal.SIGKILL, "--batch-size"),
        ("DataLoader worker (pid 7) is killed by signal: Segmentation fault.", -11, "Segmentation fault"),
        ("Too many open files. Communication with the workers is no longer possible.", 0, "ulimit -n"),
        ("[Errno 24] Too many open files: 'a.jpg'", 0, "ulimit -n"),
        ("received 0 items of ancillary data", 0, "ulimit -n"),
    ],
)
def test_the_end_of_a_loader_process_is_explained(text: str, code: int, named: str) -> None:
    assert named in (explain(RuntimeError(text), [code]) or "")


def test_other_errors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is another one than full shared memory."""
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: Usage(10**9, 0, 10**9))
    assert explain(RuntimeError("CUDA out of memory"), ()) is None
    assert explain(full, ()) is None
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0))
    assert "--shm-size" in (explain(full, ()) or "")


def test_items_fetched_in_a_thread_are_the_same_and_errors_come_through() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("gone")

    fetched = fetch_in_thread(items(), print)
    assert [next(fetched) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="gone"):
        next(fetched)
    assert list(fetch_in_thread(iter([]), print)) == []


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_fetched_from_is_freed_at_once(fails: bool) -> None:
    """Loader processes end with it; the garbage collector would end them late, and in any thread."""
    freed: list[str] = []

    class Items:
        def __iter__(self) -> Iterator[int]:
            return self  # type: ignore[return-value]

        def __next__(self) -> int:
            raise OSError if fails else StopIteration

        def __del__(self) -> None:
            freed.append("")

    gc.disable()
    try:
        with suppress(OSError):
            list(fetch_in_thread(iter(Items()), print))
        for thread in threading.enumerate():
            if thread.name.startswith("batches"):
                thread.join(10)
        assert freed
    finally:
        gc.enable()


def test_who_waits_for_an_item_can_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.01)
    stuck, waited = Event(), []

    def items() -> Iterator[int]:
        yield 1
        stuck.wait(60)

    def stop(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            raise KeyboardInterrupt

    batches = fetch_in_thread(items(), stop)
    assert next(batches) == 1
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert waited == sorted(waited)
    assert workers.is_fetching()
    stuck.set()


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_are_in_order(threads: int) -> None:
    assert map_in_threads(lambda a: a - 1, range(100)) == list(range(-1, 99))


def test_as_many_work_at_once_as_torch_has_threads(threads: int) -> None:
    meeting = threading.Barrier(threads, timeout=30)  # broken, and an error, if fewer come

    assert len(map_in_threads(lambda _: meeting.wait(), range(threads))) == threads


def test_an_error_of_a_thread_arrives(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        map_in_threads(lambda x: 1 // x, [1, 0, 2])

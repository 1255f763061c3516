"""Score inputs with threads that each do everything: read and decode a few images, then run the model.

One session with one inference thread is shared by all. That beats a pool of decoders in front of a
session with many threads by a tenth to a factor of two (benchmarks/pipelines.py): nothing waits for a
whole batch to be decoded, the pixels are still in the processor's cache, and small networks gain little
from inference threads.

Batches are cut at fixed positions of the input order, and an unreadable image is black pixels in its batch:
an answer depends on nothing but the image, its position and the model.
"""

import math
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError
from serve.contract.images import MAX_MEGAPIXELS, load_image
from serve.contract.looks import Look, look_of
from serve.contract.metadata import EMBEDDINGS_NAME, PROBABILITIES_NAME
from serve.contract.scaling import extent_of
from serve.contract.urls import redact
from serve.inputs.base import Read
from serve.inputs.inventory import Entry
from serve.outputs.layout import Row
from serve.predictor import Predictor
from serve.processors import available_processors
from serve.providers.registry import PROVIDERS
from serve.storage import is_outage

BATCH_PIXELS = 4 * 224 * 224  # on the CPU: what stays in a processor's cache
BATCH_SIZE_ON_A_DEVICE = 64
BATCH_SIZE_OF_16_BITS = 128  # on a GPU, which is done with them in half the time
RUNS_ON_A_GPU = 2  # at the same time: pixels of one travel while the other one is computed
WINDOW = 64  # batches begun or finished ahead of the one whose rows are wanted next
BATCHES_MEASURED = 2  # by each worker, before their number is decided
MAX_WORKERS = 32
MAX_STUCK = 32  # threads that hang at the same time
PATIENCE = 5.0  # seconds at the end for threads that may hang without having run out of time
TICK = 0.25  # seconds between looks at the workers


class NoThreadError(OSError):
    """The system starts no more threads for this process."""


class StorageHangsError(OSError):
    """Raised when so many reads hang that more would only collect threads."""


@dataclass
class _Batch:
    number: int
    entries: list[Entry]
    errors: list[str | None] = field(default_factory=list)  # None: not looked at yet; "": pixels are there
    transient: set[int] = field(default_factory=set)  # numbers of entries whose error may pass
    doubts: dict[int, str] = field(default_factory=dict)  # number of an entry: what looks wrong
    looks: dict[int, Look] = field(default_factory=dict)
    answers: list[NDArray[np.float32]] | None = None  # probabilities [N, classes], embeddings [N, features]
    failure: BaseException | None = None

    def rows(self) -> Iterator[Row]:
        assert self.answers is not None
        for i, (entry, error) in enumerate(zip(self.entries, self.errors, strict=True)):
            assert error is not None
            answers = [answer[i] for answer in self.answers]
            if error:
                yield Row(entry.name, error=error, transient=i in self.transient)
            elif not all(np.isfinite(answer).all() for answer in answers):
                yield Row(entry.name, error="the model's probabilities are not finite")
            else:
                embedding = answers[1] if self.answers[1:] else None
                doubt, look = self.doubts.get(i, ""), self.looks.get(i)
                yield Row(entry.name, answers[0], embedding=embedding, doubt=doubt, look=look)


def score(
    predictor: Predictor,
    entries: Iterable[Entry],
    read: Read,
    batch_size: int,
    workers: int = 0,
    image_timeout: float = 0,
    embeddings: bool = False,
    turns: "Turns | None" = None,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Generator[Row, None, None]:
    """Yield rows in the order of `entries`, exactly one for each; memory does not depend on their number.

    An input that cannot be read gets an error row; every other row is unaffected by it.

    Args:
        workers: threads; 0 begins with one a processor, then adds some if reading is mostly waiting.
        image_timeout: seconds for reading and decoding one image; 0 waits for ever. The thread that hangs
            is left behind, and another takes over the rest of its batch.
        max_megapixels: above which an image gets an error row.
        turns: limits that several calls at the same time share; unset: this call's own.

    Raises:
        UserError: an argument below its limit, or the model has no embeddings.
        StorageHangsError: more than MAX_STUCK threads hang.
    """
    check_score(predictor, batch_size, workers, image_timeout, embeddings)
    turns = turns or Turns(predictor)
    pipeline = _Pipeline(
        predictor, iter(entries), read, batch_size, image_timeout, embeddings, turns, max_megapixels
    )
    return pipeline.run(workers)


def default_batch_size(predictor: Predictor) -> int:
    if predictor.provider != "cpu":
        small = bool({predictor.precision, predictor.metadata.precision} & {"fp16", "bf16"})
        on_gpu = PROVIDERS[predictor.provider].on_gpu
        return BATCH_SIZE_OF_16_BITS if small and on_gpu else BATCH_SIZE_ON_A_DEVICE
    return min(32, max(1, BATCH_PIXELS // predictor.metadata.preprocess.size**2))


def check_score(
    predictor: Predictor, batch_size: int, workers: int, image_timeout: float, embeddings: bool
) -> None:
    """Raise UserError as `score` would, before anything is begun."""
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size} must be 1 or more")
    for flag, value in (("--workers", workers), ("--image-timeout", image_timeout)):
        if not value >= 0:  # NaN is not, either
            raise UserError(f"{flag} {value} must be 0 or more")
    if embeddings and EMBEDDINGS_NAME not in (o.name for o in predictor.session.get_outputs()):
        raise UserError(
            f"{predictor.path} has no output {EMBEDDINGS_NAME!r}: "
            "export it again with export/main.py --embeddings"
        )


class Turns:
    """Limits of how many threads call the model and decode at once, for any number of workers."""

    def __init__(self, predictor: Predictor, processors: int = 0):
        """`processors` limits both; 0: those that this process may use."""
        processors = processors or available_processors()
        # Each call of the model costs memory: no more at once than can run at once. Meanwhile the other
        # workers read and decode.
        runs = RUNS_ON_A_GPU if PROVIDERS[predictor.provider].on_gpu else 1
        self.device = threading.Semaphore(processors if predictor.provider == "cpu" else runs)
        self.decoding = threading.Semaphore(processors)  # an image may take half a gigabyte


@dataclass(eq=False)
class _Pipeline:
    predictor: Predictor
    entries: Iterator[Entry]
    read: Read
    batch_size: int
    image_timeout: float
    embeddings: bool
    turns: Turns
    max_megapixels: float
    changed: threading.Condition = field(default_factory=threading.Condition)
    """Guards the entries and everything below."""
    taken: int = 0  # batches handed out
    wanted: int = 0  # number of the batch whose rows come next
    exhausted: bool = False
    closed: bool = False
    finished: dict[int, _Batch] = field(default_factory=dict)
    workers: "list[_Worker]" = field(default_factory=list)
    stuck: "list[_Worker]" = field(default_factory=list)
    seconds: float = 0.0  # that the consumer has waited for rows, however long the process was stopped

    def run(self, workers: int) -> Generator[Row, None, None]:
        adaptive = not workers
        self.start(None)
        self.start_more((workers or available_processors()) - 1)
        try:
            while (batch := self.next_batch()) is not None:
                if batch.failure is not None:
                    raise batch.failure
                yield from batch.rows()
                if adaptive and self.wanted == BATCHES_MEASURED * len(self.workers):
                    self.start_more(self.more_workers())
        finally:
            with self.changed:
                self.closed = True
                self.changed.notify_all()
            deadline = time.monotonic() + PATIENCE
            for worker in self.workers:
                worker.thread.join(max(0.0, deadline - time.monotonic()))

    def start(self, unfinished: "_Worker | None") -> None:
        worker = _Worker(self, unfinished)
        try:
            worker.thread.start()
        except RuntimeError as error:
            raise NoThreadError(
                f"{error}: {threading.active_count()} run; raise the limit of processes (ulimit -u, or "
                "pids.max of the container)"
            ) from error
        self.workers.append(worker)

    def start_more(self, count: int) -> None:
        """Start workers, or as many of them as the machine has threads for."""
        with suppress(NoThreadError):
            for _ in range(count):
                self.start(None)

    def more_workers(self) -> int:
        """Return how many more keep the processors busy while the others wait for bytes."""
        waited, worked = sum(w.waited for w in self.workers), sum(w.worked for w in self.workers)
        if waited < worked / 2:  # a busy machine looks a little like slow storage
            return 0
        wanted = math.ceil(available_processors() * (1 + waited / max(worked, 1e-6)))
        return max(0, min(wanted, MAX_WORKERS) - len(self.workers))

    def take(self) -> _Batch | None:
        """Return the next batch for a worker, when there is room for its rows; None at the end."""
        with self.changed:
            while not self.closed and self.taken >= self.wanted + WINDOW:
                self.changed.wait()
            if self.closed or self.exhausted:
                return None
            batch = _Batch(self.taken, [])
            try:
                batch.entries = list(islice(self.entries, self.batch_size))
                batch.errors = [None] * len(batch.entries)
            except BaseException as failure:
                batch.failure = failure
                self.finished[batch.number] = batch
            self.exhausted = not batch.entries
            self.taken += bool(batch.entries or batch.failure)
            if batch.entries:
                return batch
            self.changed.notify_all()
            return None

    def next_batch(self) -> _Batch | None:
        """Wait for the batch whose turn it is, and replace workers that hang meanwhile."""
        with self.changed:
            while self.wanted not in self.finished:
                if self.exhausted and self.wanted == self.taken:
                    return None
                before = time.monotonic()
                self.changed.wait(TICK if self.image_timeout else None)
                # A process that was stopped for an hour has not waited an hour for its storage.
                self.seconds += min(time.monotonic() - before, 4 * TICK)
                if self.image_timeout:
                    self.replace_stuck_workers()
            self.wanted += 1
            self.changed.notify_all()
            return self.finished.pop(self.wanted - 1)

    def replace_stuck_workers(self) -> None:
        for worker in list(self.workers):
            if worker.slot is None or worker.queued or self.seconds - worker.since < self.image_timeout:
                continue
            self.stuck = [w for w in self.stuck if w.thread.is_alive()]
            alike = 1 + sum(w.reading == worker.reading for w in self.stuck)
            if worker.reading and alike > MAX_STUCK:
                raise StorageHangsError(f"{alike} reads hang at once: does the storage answer?")
            if alike > MAX_STUCK:  # decoding ends at some time: until one has, this one is waited for
                continue
            assert worker.batch is not None
            worker.batch.errors[worker.slot] = f"no pixels after {self.image_timeout:g} s: gave up waiting"
            if worker.reading:
                worker.batch.transient.add(worker.slot)
            worker.end_decoding()
            worker.abandoned = True
            self.workers.remove(worker)
            self.stuck.append(worker)
            self.start(worker)


class _Worker:
    """A daemon thread, so that one that hangs cannot keep the process from ending."""

    def __init__(self, pipeline: _Pipeline, unfinished: "_Worker | None"):
        size = pipeline.predictor.metadata.preprocess.size
        self.pipeline = pipeline
        self.pixels = np.zeros((pipeline.batch_size, size, size, 3), np.uint8)
        self.batch: _Batch | None = None
        self.slot: int | None = None  # that is being read and decoded
        self.since = 0.0
        self.abandoned = self.reading = self.queued = self.decoding = False
        self.waited = self.worked = 0.0  # seconds: for bytes; of the processor
        if unfinished is not None:  # its thread may still write into its own pixels: they are copied
            self.batch = unfinished.batch
            self.pixels[:] = unfinished.pixels
        self.thread = threading.Thread(target=self._work, name="score", daemon=True)

    def _work(self) -> None:
        pipeline = self.pipeline
        while True:
            self.batch = self.batch or pipeline.take()
            if self.batch is None:
                return
            batch = self.batch
            try:
                if not self._decode(batch):
                    return
                answers = self._infer(self.pixels[: len(batch.entries)])
            except BaseException as failure:
                batch.failure = failure
                answers = []
            with pipeline.changed:
                batch.answers = answers
                pipeline.finished[batch.number] = batch
                pipeline.changed.notify_all()
            self.batch = None

    def _decode(self, batch: _Batch) -> bool:
        """Fill the pixels, and return False when nobody waits for them any more."""
        started = time.thread_time()
        for slot in range(len(batch.entries)):
            if batch.errors[slot] is None:
                with self.pipeline.changed:
                    self.slot, self.since = slot, self.pipeline.seconds
                error = self._decode_into(batch, slot)
                with self.pipeline.changed:
                    if self.abandoned or self.pipeline.closed:
                        return False
                    self.slot = None
                    batch.errors[slot] = error
            if batch.errors[slot]:
                self.pixels[slot] = 0
        self.worked += time.thread_time() - started
        return True

    def _decode_into(self, batch: _Batch, slot: int) -> str:
        """Return an error message, or "" when the pixels are decoded."""
        entry, target = batch.entries[slot], self.pixels[slot]
        doubts: list[str] = []
        before, working = time.perf_counter(), time.thread_time()
        try:
            self.reading = True
            data = self.pipeline.read(entry)
            self.waited += time.perf_counter() - before - (time.thread_time() - working)
            with self._turn_to_decode():
                if not self.abandoned:
                    predictor, limit = self.pipeline.predictor, self.pipeline.max_megapixels
                    image = load_image(data, predictor.decode, doubts, limit)
                    target[...] = predictor.preprocess(image)
                    batch.looks[slot] = look_of(extent_of(image).size, target)
                    batch.doubts.update((slot, doubt) for doubt in doubts)
        except OSError as error:
            if is_outage(error):
                batch.transient.add(slot)
            return error.strerror or redact(error) or type(error).__name__
        except Exception as error:  # whatever one file does, it must cost no other file its row
            return redact(error) or type(error).__name__
        return ""

    @contextmanager
    def _turn_to_decode(self) -> Iterator[None]:
        """Hold a turn. The wait is not the image's time, and a thread that is given up loses its turn."""
        pipeline = self.pipeline
        with pipeline.changed:
            self.queued, since = True, pipeline.seconds
        pipeline.turns.decoding.acquire()
        with pipeline.changed:
            self.queued, self.reading, self.decoding = False, False, True
            self.since += pipeline.seconds - since
        try:
            yield
        finally:
            with pipeline.changed:
                self.end_decoding()

    def end_decoding(self) -> None:
        """End the decoding; the caller holds the lock."""
        if self.decoding:
            self.decoding = False
            self.pipeline.turns.decoding.release()

    def _infer(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        started = time.thread_time()
        predictor = self.pipeline.predictor
        with self.pipeline.turns.device:
            if self.pipeline.embeddings:
                names = [PROBABILITIES_NAME, EMBEDDINGS_NAME]
                answers = predictor.outputs(names, pixels)
            else:
                answers = [predictor.predict(pixels)]
        self.worked += time.thread_time() - started
        return answers

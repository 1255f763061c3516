"""One row for each input, in order, and never another file's answer, whatever fails beside it."""

import copy
import errno
import math
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from serve_model import (
    broken_files,
    build_model,
    colour_of,
    encode,
    noise,
    probabilities_for,
    solid,
)

from serve import batch
from serve.batch import StorageHangsError, Turns, check_score, default_batch_size, score
from serve.contract.doubts import NARROW
from serve.contract.images import load_image, read_image_file
from serve.contract.metadata import EMBEDDINGS_NAME
from serve.inputs.inventory import Entry
from serve.outputs.layout import Row
from serve.predictor import Predictor
from serve.storage import OutageError

NUM_IMAGES = 40


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(build_model(tmp_path_factory.mktemp("model") / "model.onnx"), "cpu", threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images, each of its own colour, and every kind of broken file."""
    root = tmp_path_factory.mktemp("images")
    for number in range(NUM_IMAGES):
        image = solid(colour_of(number), (8 + number, 48 - number))
        (root / f"{number}.png").write_bytes(encode(image, "PNG"))
    for name, (data, _) in broken_files().items():
        (root / name).write_bytes(data)
    os.mkfifo(root / "fifo.jpg")
    return root


BROKEN = [*broken_files(), "fifo.jpg", "missing.jpg"]


def broken_at(*positions: int) -> list[str]:
    """NUM_IMAGES files, with broken ones of all kinds at these positions."""
    return [
        BROKEN[i % len(BROKEN)] if i in positions else f"{NUM_IMAGES - 1 - i}.png"
        for i in range(NUM_IMAGES)
    ]


ARRANGEMENTS = {
    "none": broken_at(),
    "the first": broken_at(0),
    "the last": broken_at(NUM_IMAGES - 1),
    "every second": broken_at(*range(0, NUM_IMAGES, 2)),
    "all but one": broken_at(*(i for i in range(NUM_IMAGES) if i != 20)),
    "a whole batch": broken_at(*range(7, 14)),
    "all": broken_at(*range(NUM_IMAGES)),
}


def score_files(
    predictor: Predictor, root: Path, paths: list[str], batch_size: int, workers: int
) -> Iterator[Row]:
    entries = (Entry(path) for path in paths)
    return score(predictor, entries, lambda entry: read_image_file(root / entry.name), batch_size, workers)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (2, 8), (7, 2), (32, 4), (100, 3)])
def test_every_file_gets_its_own_answer_whatever_its_neighbours_are(
    predictor: Predictor, folder: Path, arrangement: str, batch_size: int, workers: int
) -> None:
    paths = ARRANGEMENTS[arrangement]
    rows = list(score_files(predictor, folder, paths, batch_size, workers))
    assert [row.path for row in rows] == paths
    for row in rows:
        if row.path in BROKEN:
            assert row.error
            assert row.probabilities is None
        else:
            assert row.error == ""
            expected = probabilities_for(colour_of(int(Path(row.path).stem)))
            np.testing.assert_allclose(row.probabilities, expected, rtol=1e-5)


def test_rows_kept_are_not_overwritten_by_later_batches(predictor: Predictor, folder: Path) -> None:
    first = next(rows := score_files(predictor, folder, ARRANGEMENTS["none"], 2, 2))
    assert first.probabilities is not None
    before = first.probabilities.copy()
    list(rows)
    np.testing.assert_array_equal(first.probabilities, before)


def test_each_error_row_says_what_is_wrong_with_that_file(predictor: Predictor, folder: Path) -> None:
    reasons = {name: reason for name, (_, reason) in broken_files().items()}
    reasons |= {"fifo.jpg": "not a regular file", "missing.jpg": "No such file"}
    rows = {row.path: row.error for row in score_files(predictor, folder, list(reasons), 4, 2)}
    for name, reason in reasons.items():
        assert reason in rows[name]


def test_a_picture_that_looks_wrong_is_scored_and_named(predictor: Predictor, tmp_path: Path) -> None:
    narrow = np.arange(48 * 40, dtype=np.uint16).reshape(40, 48)
    Image.fromarray(narrow).save(tmp_path / "1.png")
    for name in ("0.png", "2.png"):
        (tmp_path / name).write_bytes(encode(solid((9, 9, 9)), "PNG"))
    rows = list(score_files(predictor, tmp_path, ["0.png", "1.png", "2.png"], 2, 2))
    assert [row.doubt for row in rows] == ["", NARROW, ""]
    assert all(row.probabilities is not None and not row.error for row in rows)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OutageError("no answer from the bucket"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (OSError("403 Forbidden"), False),
        (ValueError("not an image"), False),
    ],
    ids=repr,
)
def test_an_error_may_pass_if_it_is_the_storages(
    predictor: Predictor, error: Exception, passes: bool
) -> None:
    def read(entry: Entry) -> bytes:
        raise error

    (row,) = score(predictor, [Entry("0.png")], read, 1, 1)
    assert row.error
    assert row.transient == passes


@pytest.fixture(autouse=True)
def left_by_others() -> None:
    """Threads that other tests have left hanging."""
    LEFT_BY_OTHERS[:] = threading.enumerate()


LEFT_BY_OTHERS: list[threading.Thread] = []


def threads_at_work() -> int:
    return sum(t.name == "score" and t not in LEFT_BY_OTHERS for t in threading.enumerate())


def test_no_files_no_rows(predictor: Predictor, folder: Path) -> None:
    assert list(score_files(predictor, folder, [], 8, 2)) == []


@pytest.mark.parametrize(
    ("batch_size", "workers", "named"),
    [(0, 1, "--batch-size 0"), (-1, 1, "--batch-size -1"), (1, -2, "--workers -2")],
)
def test_sizes_below_their_limits_are_refused(
    predictor: Predictor, folder: Path, batch_size: int, workers: int, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        next(score_files(predictor, folder, ["0.png"], batch_size, workers))


@pytest.mark.parametrize("seconds", [-1, math.nan])
def test_a_timeout_that_is_no_time_is_refused(predictor: Predictor, seconds: float) -> None:
    with pytest.raises(ValueError, match=f"--image-timeout {seconds}"):
        check_score(predictor, 1, 0, seconds, embeddings=False)


@pytest.mark.parametrize(("size", "expected"), [(8, 32), (224, 4), (512, 1)])
def test_a_batch_is_what_stays_in_the_cache_but_never_empty(
    tmp_path: Path, size: int, expected: int
) -> None:
    model = build_model(tmp_path / "model.onnx", size=size)
    assert default_batch_size(Predictor(model, "cpu", threads=1)) == expected


@pytest.mark.parametrize(
    ("provider", "precision", "runs", "size"),
    [
        ("cuda", "fp32", 2, 64),
        ("cuda", "tf32", 2, 64),
        ("tensorrt", "fp16", 2, 128),
        ("tensorrt", "bf16", 2, 128),
        ("openvino", "bf16", 1, 64),
        ("cpu", "fp32", 3, 32),
    ],
)
def test_a_gpu_has_two_runs_in_flight_and_larger_batches_of_16_bits(
    predictor: Predictor, provider: str, precision: str, runs: int, size: int
) -> None:
    there = copy.copy(predictor)
    there.provider, there.precision = provider, precision
    device = Turns(there, 3).device
    assert [device.acquire(blocking=False) for _ in range(runs + 1)] == [True] * runs + [False]
    assert default_batch_size(there) == size


def test_memory_is_a_batch_a_worker_whatever_the_number_of_files(tmp_path: Path) -> None:
    size, batch_size, threads = 256, 4, 2
    (tmp_path / "x.jpg").write_bytes(encode(noise(20, 20), "JPEG"))
    predictor = Predictor(build_model(tmp_path / "m.onnx", size=size), "cpu", threads=1)
    pixels = size * size * 3
    tracemalloc.start()  # sees numpy's arrays
    try:
        rows = score_files(predictor, tmp_path, ["x.jpg"] * 80, batch_size, threads)
        scored = sum(not row.error for row in rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert scored == 80
    # a batch for each thread, and what it is resizing; all 80 images would be 80 * pixels
    assert peak < (2 * batch_size + 4 * threads + 2) * pixels


def test_a_consumer_that_stops_leaves_no_thread_behind(predictor: Predictor, folder: Path) -> None:
    rows = score_files(predictor, folder, ARRANGEMENTS["none"] * 20, 4, 3)
    next(rows)
    assert threads_at_work()
    rows.close()
    assert not threads_at_work()


def test_answers_that_are_not_numbers_are_errors_not_labels(
    predictor: Predictor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(os.listdir(folder))[:4]
    honest = predictor.predict
    # the first readable file; its place in the list is its place in the only batch
    broken = next(i for i, row in enumerate(score_files(predictor, folder, paths, 4, 2)) if not row.error)

    def predict(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        answers = honest(pixels).copy()
        answers[broken] = np.nan
        return answers

    monkeypatch.setattr(predictor, "predict", predict)
    rows = list(score_files(predictor, folder, paths, 4, 2))
    assert rows[broken].error == "the model's probabilities are not finite"
    assert rows[broken].probabilities is None


def test_batches_are_cut_at_fixed_places_and_unreadable_images_are_black_in_them(
    predictor: Predictor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So an answer cannot depend on whether another image was readable, not even in its last bit."""
    batches: list[tuple[int, list[int]]] = []
    honest = predictor.predict

    def predict(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        batches.append((len(pixels), [i for i, image in enumerate(pixels) if not image.any()]))
        return honest(pixels)

    monkeypatch.setattr(predictor, "predict", predict)
    list(score_files(predictor, folder, broken_at(1, 8, 9, 39), 7, 1))
    assert [size for size, _ in batches] == [7, 7, 7, 7, 7, 5]
    assert [black for _, black in batches] == [[1], [1, 2], [], [], [], [4]]


def test_an_error_of_the_model_or_of_the_list_is_raised_not_waited_for(
    predictor: Predictor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> Iterator[Entry]:
        yield from (Entry("0.png") for _ in range(9))
        raise OSError("the list ended")

    rows = score(predictor, names(), lambda entry: read_image_file(folder / entry.name), 4, 3)
    with pytest.raises(OSError, match="the list ended"):
        list(rows)

    def predict(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise MemoryError("no room for the activations")

    monkeypatch.setattr(predictor, "predict", predict)
    with pytest.raises(MemoryError, match="no room"):
        list(score_files(predictor, folder, ARRANGEMENTS["none"], 4, 3))
    assert not threads_at_work()


# -- images that hang ------------------------------------------------------------------------------------


class HangingFolder:
    """Reads from a folder, but some names only when they are released."""

    def __init__(self, root: Path, *hanging: str):
        self.root, self.hanging = root, hanging
        self.released = threading.Event()

    def read(self, entry: Entry) -> bytes:
        if entry.name in self.hanging:
            self.released.wait(30)
        return read_image_file(self.root / entry.name)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_that_hangs_gets_an_error_row_and_the_others_their_own_answers(
    predictor: Predictor, folder: Path, workers: int
) -> None:
    paths = ARRANGEMENTS["none"]
    hanging = (paths[0], paths[9], paths[11], paths[39])
    storage = HangingFolder(folder, *hanging)
    rows = []
    for row in score(predictor, map(Entry, paths), storage.read, 4, workers, image_timeout=0.3):
        rows.append(row)
        if len(rows) == 20:
            storage.released.set()  # from now on, threads that were given up come back with pixels
    assert [row.path for row in rows] == paths
    assert all(row.error for row in rows if row.path in hanging[:3])
    for row in rows:
        if row.error:
            assert row.path in hanging
            assert row.error == "no pixels after 0.3 s: gave up waiting"
        else:
            np.testing.assert_allclose(
                row.probabilities, probabilities_for(colour_of(int(Path(row.path).stem))), rtol=1e-5
            )


def test_a_thread_that_comes_back_too_late_changes_nothing(predictor: Predictor, folder: Path) -> None:
    """Not even while another thread still works on the same batch."""
    released = threading.Event()

    def read(entry: Entry) -> bytes:
        if entry.name == "0.png":
            released.wait(30)
        elif entry.name == "1.png":  # the next of the batch, so the first has been given up
            released.set()
            time.sleep(0.2)
        return read_image_file(folder / entry.name)

    first, second = score(predictor, map(Entry, ["0.png", "1.png"]), read, 2, 1, image_timeout=0.5)
    assert first.error == "no pixels after 0.5 s: gave up waiting"
    assert first.probabilities is None
    np.testing.assert_allclose(second.probabilities, probabilities_for(colour_of(1)), rtol=1e-5)


def test_a_read_that_hangs_may_pass_and_a_decoder_that_hangs_will_not(
    predictor: Predictor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    storage = HangingFolder(folder, "0.png")
    (read,) = score(predictor, [Entry("0.png")], storage.read, 1, 1, image_timeout=0.1)
    storage.released.set()

    def load(data: bytes, *options: Any) -> Image.Image:
        released.wait(30)
        return load_image(data, *options)

    monkeypatch.setattr(batch, "load_image", load)
    (decoded,) = score(predictor, [Entry("0.png")], storage.read, 1, 1, image_timeout=0.1)
    released.set()
    assert read.error == decoded.error == "no pixels after 0.1 s: gave up waiting"
    assert (read.transient, decoded.transient) == (True, False)


def test_a_process_that_was_stopped_for_an_hour_gives_no_image_up(
    predictor: Predictor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock runs meanwhile, and nothing else does."""
    stopped, clock = 0.0, time.monotonic

    def read(entry: Entry) -> bytes:
        nonlocal stopped
        for hour in (0, 3600, 0):
            stopped += hour
            time.sleep(0.05)  # the consumer looks at the workers
        return read_image_file(folder / entry.name)

    monkeypatch.setattr(batch, "TICK", 0.01)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + stopped)
    (row,) = score(predictor, [Entry("0.png")], read, 1, 1, image_timeout=60)
    assert row.error == ""


def test_storage_that_hangs_altogether_ends_the_job(
    predictor: Predictor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MAX_STUCK", 5)
    monkeypatch.setattr(batch, "PATIENCE", 0.1)
    paths = ARRANGEMENTS["none"]
    storage = HangingFolder(folder, *paths)
    with pytest.raises(StorageHangsError, match="6 reads"):
        list(score(predictor, map(Entry, paths), storage.read, 4, 2, image_timeout=0.1))
    storage.released.set()


class SlowDecoder:
    """Pillow, but for some pictures only when they are released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, *slow: str):
        self.slow = [(folder / name).read_bytes() for name in slow]
        self.released = threading.Event()
        monkeypatch.setattr(batch, "load_image", self.load)

    def load(self, data: bytes, *options: Any) -> Image.Image:
        if data in self.slow:
            self.released.wait(30)
        return load_image(data, *options)


@pytest.mark.parametrize("slow", [2, 7])
def test_images_that_take_too_long_to_decode_cost_no_other_image_its_answer(
    predictor: Predictor, folder: Path, monkeypatch: pytest.MonkeyPatch, slow: int
) -> None:
    """As many as may be decoded at once, and more than may be left behind."""
    monkeypatch.setattr(batch, "available_processors", lambda: 2)
    monkeypatch.setattr(batch, "MAX_STUCK", 5)
    paths = ARRANGEMENTS["none"]
    decoder = SlowDecoder(monkeypatch, folder, *paths[3 : 3 + slow])
    if slow > batch.MAX_STUCK:
        threading.Timer(2, decoder.released.set).start()
    rows = list(
        score(
            predictor,
            map(Entry, paths),
            lambda e: read_image_file(folder / e.name),
            4,
            4,
            image_timeout=0.3,
        )
    )
    decoder.released.set()
    assert [row.path for row in rows] == paths
    failed = {row.path for row in rows if row.error}
    assert failed <= set(paths[3 : 3 + slow])
    assert len(failed) >= min(slow, batch.MAX_STUCK)
    assert not any(row.transient for row in rows)


# -- the number of workers -------------------------------------------------------------------------------


def test_workers_are_added_when_reading_is_mostly_waiting(predictor: Predictor, folder: Path) -> None:
    counts = []

    def read(entry: Entry) -> bytes:
        time.sleep(0.02)
        return read_image_file(folder / entry.name)

    for _ in score(predictor, map(Entry, ARRANGEMENTS["none"] * 4), read, 2):
        counts.append(threads_at_work())
    assert counts[0] == batch.available_processors()
    assert 2 * batch.available_processors() < max(counts) <= batch.MAX_WORKERS


# -- embeddings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_limit_of_threads_is_met_with_those_that_start(
    predictor: Predictor, folder: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = threading.Thread.start, []

    def start_few(thread: threading.Thread) -> None:
        if len(started) == threads:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_few)
    rows = score_files(predictor, folder, ARRANGEMENTS["none"], 7, 8)
    if threads:
        assert [row.error for row in rows] == [""] * NUM_IMAGES
    else:
        with pytest.raises(OSError, match=r"ulimit -u"):
            list(rows)


def test_embeddings_are_the_models_third_output(tmp_path: Path, folder: Path, predictor: Predictor) -> None:
    model = build_model(tmp_path / "model.onnx", outputs=(*predictor_outputs(predictor), EMBEDDINGS_NAME))
    paths = broken_at(3)[:8]
    entries = map(Entry, paths)
    rows = list(
        score(
            Predictor(model, "cpu", threads=1),
            entries,
            lambda e: read_image_file(folder / e.name),
            4,
            2,
            embeddings=True,
        )
    )
    assert rows[3].embedding is None
    for row in (rows[0], rows[7]):  # of this model, the mean colour
        np.testing.assert_allclose(row.embedding, colour_of(int(Path(row.path).stem)), rtol=1e-5)
    with pytest.raises(ValueError, match=r"'embeddings'.*--embeddings"):
        score(predictor, [], lambda e: b"", 1, embeddings=True)


def predictor_outputs(predictor: Predictor) -> list[str]:
    return [output.name for output in predictor.session.get_outputs()]

"""Score a list of image files: decode in threads, overlapped with the session; one row for each input."""

import csv
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from serve.predictor import Predictor
from serve.preprocess import load_image, read_image_file


@dataclass(frozen=True)
class Row:
    """The outcome for one input: probabilities or an error, never both."""

    path: str
    probabilities: NDArray[np.float32] | None = None
    """float32 [num_classes]."""
    error: str = ""


@dataclass
class _Batch:
    paths: Sequence[str]
    pixels: NDArray[np.uint8]  # [batch_size, size, size, 3], written in place by the decoding threads
    slots: list[Future[str]]  # an error message, or "" when the slot's pixels are there


def score(
    predictor: Predictor, root: Path, paths: Sequence[str], batch_size: int, decode_threads: int
) -> Iterator[Row]:
    """Rows in the order of `paths` (relative to `root`); memory is two batches, whatever their number.

    A file that cannot be read gets an error row; every other row is unaffected by it.
    """
    if batch_size < 1 or decode_threads < 1:
        raise ValueError(f"batch_size {batch_size} and decode_threads {decode_threads} must be 1 or more")
    size = predictor.metadata.preprocess.size
    # Two buffers in turn: one is filled by the threads while the session reads the other.
    buffers = [np.empty((min(batch_size, len(paths)), size, size, 3), np.uint8) for _ in range(2)]
    pool = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")

    def submit(number: int) -> _Batch | None:
        chunk = paths[number * batch_size : (number + 1) * batch_size]
        if not chunk:
            return None
        pixels = buffers[number % 2]
        slots = [
            pool.submit(_decode_into, pixels[i], root, path, predictor) for i, path in enumerate(chunk)
        ]
        return _Batch(chunk, pixels, slots)

    try:
        number, batch = 0, submit(0)
        while batch is not None:
            errors = [slot.result() for slot in batch.slots]
            number += 1
            following = submit(number)
            yield from _infer(predictor, batch, errors)
            batch = following
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_into(target: NDArray[np.uint8], root: Path, path: str, predictor: Predictor) -> str:
    try:
        target[...] = predictor.preprocess(load_image(read_image_file(root / path)))
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    except Exception as error:  # whatever one file does, it must cost no other file its row
        return str(error) or type(error).__name__
    return ""


def _infer(predictor: Predictor, batch: _Batch, errors: list[str]) -> Iterator[Row]:
    good = [i for i, error in enumerate(errors) if not error]
    pixels = batch.pixels[: len(errors)] if len(good) == len(errors) else batch.pixels[good]
    probabilities = iter(predictor.predict(pixels)) if good else iter(())
    for path, error in zip(batch.paths, errors, strict=True):
        if error:
            yield Row(path, error=error)
            continue
        answer = next(probabilities)
        if np.isfinite(answer).all():
            yield Row(path, answer)
        else:
            yield Row(path, error="the model's probabilities are not finite")
    assert next(probabilities, None) is None, "more probabilities than good images"


@contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """A text file that appears under its name whole, or not at all.

    A link is written through. A file name that is not UTF-8 is written with backslash escapes.
    """
    path = Path(os.path.realpath(path))
    # Not named by process id: pods that share a folder all have the same one.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _UnixLines:
    """Ends the lines of csv.writer with a plain newline.

    Told to do so itself, it would not quote a file name with a carriage return (before Python 3.13), and
    a reader would see two rows.
    """

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, line: str) -> None:
        self.file.write(line.removesuffix("\r\n") + "\n")


def write_csv(file: TextIO, rows: Iterable[Row], class_names: Sequence[str]) -> Iterator[Row]:
    """Columns path, label, probability, probability_CLASS for each class, error. Passes the rows on."""
    writer = csv.writer(_UnixLines(file), lineterminator="\r\n")
    header = ["path", "label", "probability", *(f"probability_{c}" for c in class_names), "error"]
    writer.writerow(header)
    for row in rows:
        if row.probabilities is None:
            writer.writerow([row.path, "", "", *("" for _ in class_names), row.error])
        else:
            best = int(row.probabilities.argmax())
            # str of a float32 is the shortest text that reads back as the same number
            values = [str(p) for p in row.probabilities]
            writer.writerow([row.path, class_names[best], values[best], *values, ""])
        yield row


def write_kaggle(file: TextIO, rows: Iterable[Row], labels: bool) -> Iterator[Row]:
    """Columns id (file name without suffix) and label. Passes the rows on.

    label is the probability of the second class, or with `labels` the number of the likeliest class.
    It is empty for an unreadable file: Kaggle refuses that, where a guess would pass unseen.
    """
    writer = csv.writer(_UnixLines(file), lineterminator="\r\n")
    writer.writerow(["id", "label"])
    for row in rows:
        label = ""
        if row.probabilities is not None:
            label = str(row.probabilities.argmax() if labels else row.probabilities[1])
        writer.writerow([Path(row.path).stem, label])
        yield row


def check_kaggle(paths: Sequence[str], num_classes: int, labels: bool) -> None:
    """Raises ValueError when the Kaggle format cannot hold the answers."""
    if num_classes != 2 and not labels:
        raise ValueError(
            f"--format kaggle writes the second of two classes' probability, and the model has "
            f"{num_classes} classes: add --labels or use --format csv"
        )
    ids: dict[str, str] = {}
    for path in paths:
        stem = Path(path).stem
        if stem in ids:
            raise ValueError(
                f"--format kaggle: {ids[stem]!r} and {path!r} have the same id {stem!r}; "
                "rename one or use --format csv"
            )
        ids[stem] = path

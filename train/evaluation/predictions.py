"""val_predictions.npz and .csv: the answers of a run's best checkpoint on its validation images.

The arrays are written whenever an epoch is the best so far. The table is written from them when the run
ends or stops, and replaces them if it holds as much. While there are arrays, they are what is read.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError
from serve.contract.files import atomic_write
from train.data.index import ImageSet
from train.data.layouts.soft_labels import SOFT_COLUMN
from train.evaluation.calibration import log_probability_blocks
from train.evaluation.metrics import TOP, Evaluation

TABLE = "val_predictions.csv"
COLUMNS = ("path", "label", "prediction", "correct", "loss")  # then probability_CLASS of each class
MOST_COLUMNS = 100  # classes; a table of 50,000 images and 1,000 classes would have 0.7 GB
RANKED = tuple(f"{name}_{k}" for k in range(1, TOP + 1) for name in ("top", "top_probability"))
SHORT = (*COLUMNS, "label_probability", *RANKED)


@dataclass(frozen=True)
class Predictions:
    """Answers as the exported model gives them: calibrated and clipped as set; arrays are [N], N > 0."""

    source: str
    """File, for messages."""
    paths: list[str]
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    losses: NDArray[np.float64]
    """Cross-entropy of each image."""
    probabilities: NDArray[np.float64]
    """[N, num_classes]"""
    class_names: tuple[str, ...]

    @property
    def correct(self) -> NDArray[np.bool_]:
        return np.asarray(self.labels == self.predicted)

    @property
    def confidence(self) -> NDArray[np.float64]:
        """[N], of the predicted class."""
        return self.probabilities[np.arange(len(self.labels)), self.predicted]

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def label_names(self) -> list[str]:
        return [self.class_names[label] for label in self.labels]

    @property
    def confusion(self) -> NDArray[np.int64]:
        """[num_classes, num_classes], number of images by true class and predicted class."""
        counts = np.zeros((len(self.class_names),) * 2, np.int64)
        np.add.at(counts, (self.labels, self.predicted), 1)
        return counts


@dataclass(frozen=True)
class StoredAnswers:
    """What the predictions are computed from: val_predictions.npz, without loss of a bit."""

    paths: list[str]
    labels: NDArray[np.int64]
    """[N]"""
    class_names: tuple[str, ...]
    logits: NDArray[Any]
    """[N, num_classes], float32 or float64."""
    temperature: float
    clip: float

    @classmethod
    def of(
        cls, images: ImageSet, evaluation: Evaluation, temperature: float, clip: float
    ) -> "StoredAnswers":
        paths, names = list(images.paths), images.class_names
        return cls(paths, evaluation.labels, names, evaluation.logits, temperature, clip)

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """Yield log probabilities [rows, num_classes] for some rows at a time."""
        return log_probability_blocks(self.logits, self.temperature, self.clip)

    def predictions(self, source: str) -> Predictions:
        log_probs = np.concatenate([values for _, values in self.blocks()])
        losses = -log_probs[np.arange(len(self.labels)), self.labels]
        predicted = log_probs.argmax(axis=1)
        probabilities = np.exp(log_probs, out=log_probs)
        names = self.class_names
        return Predictions(source, self.paths, self.labels, predicted, losses, probabilities, names)

    def save(self, path: Path) -> None:
        """Write the arrays, then remove the table of older answers beside them."""
        with atomic_write(path) as file:
            np.savez(
                file,
                logits=self.logits,
                labels=self.labels,
                temperature=np.float64(self.temperature),
                clip=np.float64(self.clip),
                paths=_as_bytes(self.paths),
                class_names=_as_bytes(self.class_names),
            )
        path.with_suffix(".csv").unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "StoredAnswers":
        """
        Raises:
            UserError: the file is damaged; the message names it.
        """
        with _open_arrays(path) as arrays:
            return cls(
                *_labelled(arrays), arrays["logits"], float(arrays["temperature"]), float(arrays["clip"])
            )


def arrays_of(table: Path) -> Path:
    """Return the path of the arrays that belong to val_predictions.csv."""
    return table.with_suffix(".npz")


def _as_bytes(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Return texts as JSON: numpy would give each as many bytes as the longest."""
    return np.frombuffer(json.dumps(list(texts)).encode(), np.uint8)


@contextmanager
def _open_arrays(path: Path) -> Iterator[Any]:
    try:
        with np.load(path) as arrays:
            yield arrays
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (BadZipFile, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _labelled(arrays: Any) -> tuple[list[str], NDArray[np.int64], tuple[str, ...]]:
    paths, names = (json.loads(arrays[key].tobytes()) for key in ("paths", "class_names"))
    return paths, arrays["labels"], tuple(names)


def read_labels(table: Path) -> tuple[list[str], list[str]]:
    """Return paths and class names of the validation images of a run, of its arrays or its table.

    Raises:
        UserError: the file cannot be read, or holds no images.
    """
    if arrays_of(table).exists():
        with _open_arrays(arrays_of(table)) as arrays:
            paths, labels, names = _labelled(arrays)
        return paths, [names[label] for label in labels]
    try:
        with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{table} cannot be read: {error.strerror}") from error
    if not rows or any(row.get("path") is None or row.get("label") is None for row in rows):
        raise UserError(f"{table} holds no validation images (columns path and label)")
    return [row["path"] for row in rows], [row["label"] for row in rows]


def write_predictions(
    path: Path, images: ImageSet, evaluation: Evaluation, temperature: float = 1.0, clip: float = 0.0
) -> None:
    """Write a row for each image, and replace an older file whole; see `write_answers`."""
    write_answers(path, StoredAnswers.of(images, evaluation, temperature, clip))


def write_answers(path: Path, answers: StoredAnswers) -> None:
    """Write a row for each image, and replace an older file whole.

    With more than MOST_COLUMNS classes, a row has the probabilities of its label and of the TOP likeliest
    classes in place of all.
    """
    names, labels = answers.class_names, answers.labels
    short = len(names) > MOST_COLUMNS
    with atomic_write(path, "w", newline="", errors="surrogateescape") as file:
        # texts in quotes: without them a carriage return in a file name would end the row
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(SHORT if short else [*COLUMNS, *(SOFT_COLUMN + name for name in names)])
        rows = csv.writer(file, lineterminator="", quoting=csv.QUOTE_NONNUMERIC)
        for part, log_probs in answers.blocks():
            label_of, predicted = labels[part], log_probs.argmax(axis=1)
            losses = -log_probs[np.arange(len(label_of)), label_of]
            top = np.argsort(-log_probs, axis=1, kind="stable")[:, :TOP] if short else None
            for i, image in enumerate(answers.paths[part]):
                label, guess, values = label_of[i], predicted[i], np.exp(log_probs[i])
                row = [image, names[label], names[guess], int(label == guess), float(f"{losses[i]:.6f}")]
                if top is None:
                    rows.writerow(row)
                    file.write("".join([f",{p:.8g}" for p in values.tolist()]) + "\n")
                else:
                    ranked = [field for k in top[i] for field in (names[k], _rounded(values[k]))]
                    writer.writerow([*row, _rounded(values[label]), *ranked])


def _rounded(probability: float) -> float:
    return float(f"{probability:.8g}")


def is_short(table: Path) -> bool:
    """Return whether a table has some classes of each image only, so that its arrays are needed."""
    with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return tuple(next(csv.reader(file), [])) == SHORT


def finish_predictions(table: Path) -> None:
    """Write the table of the arrays beside it, and remove them if it has all classes; without arrays, the
    table is the best epoch's already.

    Raises:
        UserError: the arrays are damaged, or the table cannot be written.
    """
    if not arrays_of(table).exists():
        return
    answers = StoredAnswers.load(arrays_of(table))
    try:
        write_answers(table, answers)
        if len(answers.class_names) <= MOST_COLUMNS:
            arrays_of(table).unlink()
    except OSError as error:
        raise UserError(f"{table} cannot be written: {error}; {arrays_of(table)} is whole") from error


@contextmanager
def predictions_at_a_stop(table: Path, enabled: bool) -> Iterator[None]:
    """Write the table also if an error or a signal ends the block; a failure is a warning, since other
    commands can do with the arrays."""
    try:
        yield
    except BaseException:
        if enabled:
            try:
                finish_predictions(table)
            except (UserError, MemoryError) as error:
                print(f"warning: {error}", flush=True)
        raise


def read_predictions(path: Path) -> Predictions:
    """Return what val_predictions.npz beside `path` holds, if there is one, or else the table at `path`.

    Raises:
        UserError: the file is missing, damaged or contradicts itself; the message names it.
    """
    if arrays_of(path).exists():
        return StoredAnswers.load(arrays_of(path)).predictions(str(arrays_of(path)))
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.reader(file, strict=True)
            header = next(table, [])
            rows = list(table)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except csv.Error as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if tuple(header) == SHORT:
        raise UserError(
            f"{path} has only the {TOP} likeliest classes of each image: {arrays_of(path).name}, which has "
            "all of them, must be beside it"
        )
    names = tuple(column.removeprefix(SOFT_COLUMN) for column in header[len(COLUMNS) :])
    if header != [*COLUMNS, *(SOFT_COLUMN + name for name in names)] or len(names) < 2:
        raise UserError(f"{path} is not a table of predictions: its columns are {header}")
    if not rows:
        raise UserError(f"{path} is damaged: it has no rows")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise UserError(f"{path} is damaged: row {number} has {len(row)} of {len(header)} values")
    paths, *texts = zip(*rows, strict=True)
    if len(set(paths)) < len(paths):
        twice = Counter(paths).most_common(1)[0][0]
        raise UserError(f"{path} is damaged: {twice!r} occurs twice")
    indices = {name: i for i, name in enumerate(names)}
    try:
        labels, predicted = (np.array([indices[name] for name in column]) for column in texts[:2])
        numbers = np.array(texts[2:], np.float64)
    except KeyError as error:
        raise UserError(f"{path} is damaged: {error} is not one of its classes {list(names)}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if (numbers[0] != (labels == predicted)).any():
        raise UserError(f"{path} is damaged: the column 'correct' contradicts label and prediction")
    return Predictions(str(path), list(paths), labels, predicted, numbers[1], numbers[2:].T, names)

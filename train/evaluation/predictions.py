"""The answers of a run's best checkpoint on its validation images: val_predictions.npz and .csv.

The arrays are written whenever an epoch is the best so far, and are what is read. The table for people is
written from them when the run ends or stops.
"""

import csv
import json
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
from train.data.layouts.soft_labels import SOFT_COLUMN
from train.evaluation.calibration import log_probability_blocks
from train.evaluation.metrics import TOP

TABLE, ARRAYS = "val_predictions.csv", "val_predictions.npz"
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
    temperature: float = 1.0
    clip: float = 0.0

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

    def save(self, run: Path) -> None:
        """Write the arrays into a run directory, then remove the table of older answers."""
        with atomic_write(run / ARRAYS) as file:
            np.savez(
                file,
                logits=self.logits,
                labels=self.labels,
                temperature=np.float64(self.temperature),
                clip=np.float64(self.clip),
                paths=_as_bytes(self.paths),
                class_names=_as_bytes(self.class_names),
            )
        (run / TABLE).unlink(missing_ok=True)

    @classmethod
    def load(cls, run: Path) -> "StoredAnswers":
        """Read the arrays of a run directory. Raises UserError, which names the file, if it is missing or
        damaged."""
        with _open_arrays(run / ARRAYS) as arrays:
            return cls(
                *_labelled(arrays), arrays["logits"], float(arrays["temperature"]), float(arrays["clip"])
            )


def read_predictions(run: Path) -> Predictions:
    """Return the predictions of a run directory. Raises UserError as `StoredAnswers.load` does."""
    return StoredAnswers.load(run).predictions(str(run / ARRAYS))


def read_labels(run: Path) -> tuple[list[str], list[str]]:
    """Return paths and class names of a run's validation images. Raises as `StoredAnswers.load` does."""
    with _open_arrays(run / ARRAYS) as arrays:
        paths, labels, names = _labelled(arrays)
    return paths, [names[label] for label in labels]


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
        for part, log_probs in answers.blocks():
            label_of, predicted = labels[part], log_probs.argmax(axis=1)
            losses = -log_probs[np.arange(len(label_of)), label_of]
            top = np.argsort(-log_probs, axis=1, kind="stable")[:, :TOP] if short else None
            for i, image in enumerate(answers.paths[part]):
                label, guess, values = label_of[i], predicted[i], np.exp(log_probs[i])
                row = [image, names[label], names[guess], int(label == guess), float(f"{losses[i]:.6f}")]
                if top is None:
                    row += map(_rounded, values)
                else:
                    row.append(_rounded(values[label]))
                    row += [field for k in top[i] for field in (names[k], _rounded(values[k]))]
                writer.writerow(row)


def _rounded(probability: float) -> float:
    return float(f"{probability:.8g}")


def finish_predictions(run: Path) -> None:
    """Write the table of the arrays in a run directory, if there are any. Raises UserError if they are
    damaged, or the table cannot be written."""
    if not (run / ARRAYS).exists():
        return
    answers = StoredAnswers.load(run)
    try:
        write_answers(run / TABLE, answers)
    except OSError as error:
        raise UserError(f"{run / TABLE} cannot be written: {error}; {ARRAYS} beside it is whole") from error


@contextmanager
def predictions_at_a_stop(run: Path, enabled: bool) -> Iterator[None]:
    """Write the table also if an error or a signal ends the block; a failure is a warning, since other
    commands read the arrays."""
    try:
        yield
    except BaseException:
        if enabled:
            try:
                finish_predictions(run)
            except (UserError, MemoryError) as error:
                print(f"warning: {error}", flush=True)
        raise

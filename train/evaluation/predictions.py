"""val_predictions.csv: the answers of a run's best checkpoint on its validation images."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError
from serve.contract.files import atomic_write
from train.data.index import ImageSet
from train.data.layouts.soft_labels import SOFT_COLUMN
from train.evaluation.calibration import log_probabilities
from train.evaluation.metrics import Evaluation

COLUMNS = ("path", "label", "prediction", "correct", "loss")  # then probability_CLASS of each class


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


def write_predictions(
    path: Path, images: ImageSet, evaluation: Evaluation, temperature: float = 1.0, clip: float = 0.0
) -> None:
    """Write a row for each image, and replace an older file whole."""
    names, labels = images.class_names, evaluation.labels
    log_probs = log_probabilities(evaluation.logits, temperature, clip)
    predicted = log_probs.argmax(axis=1)
    losses = -log_probs[np.arange(len(labels)), labels]
    with atomic_write(path, "w", newline="", errors="surrogateescape") as file:
        # texts in quotes: without them a carriage return in a file name would end the row
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow([*COLUMNS, *(SOFT_COLUMN + name for name in names)])
        rows = csv.writer(file, lineterminator="", quoting=csv.QUOTE_NONNUMERIC)
        for image, label, guess, loss, row in zip(
            images.paths, labels, predicted, losses, np.exp(log_probs).tolist(), strict=True
        ):
            rows.writerow([image, names[label], names[guess], int(label == guess), float(f"{loss:.6f}")])
            file.write("".join([f",{p:.8g}" for p in row]) + "\n")


def read_predictions(path: Path) -> Predictions:
    """
    Raises:
        UserError: the file is missing, damaged or contradicts itself; the message names it.
    """
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.reader(file, strict=True)
            header = next(table, [])
            rows = list(table)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except csv.Error as error:
        raise UserError(f"{path} is damaged: {error}") from error
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
        twice = max(paths, key=paths.count)
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

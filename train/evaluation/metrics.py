"""Validation metrics from the logits of every validation image: exact with any number of processes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.evaluation.calibration import Floats, Labels, SoftmaxRows, calibration_error, in_threads

TOP, TOP_FROM = 5, 10  # top-5 accuracy is of ten classes or more
MOST_CLASSES = 40  # a larger confusion matrix cannot be read
CLASSES_AT_ONCE, ROWS_AT_ONCE = 64, 256
FEW = 200  # images of a class; beyond, sorting all scores takes less time than comparing each with all


@dataclass(frozen=True)
class Evaluation:
    """Answers of one checkpoint on the whole validation set, and their metrics."""

    logits: NDArray[Any]
    """[N, num_classes], float32 as the network gives them, or float64."""
    labels: Labels
    """[N]"""
    values: dict[str, float]
    """Metric name -> value: accuracy, top5_accuracy (of ten classes or more), log_loss, ece, temperature,
    log_loss_calibrated, ece_calibrated, roc_auc, f1_macro. F1 of each class is in per_class.csv."""


def top_accuracy(logits: NDArray[Any], labels: Labels, k: int = TOP) -> float:
    """Return the share of images whose class is among the `k` likeliest, of equal ones the first.

    `logits`: [N, num_classes], `labels`: [N]. With k = 1 it is the accuracy of argmax. NaN is never right.
    """
    classes, right = np.arange(logits.shape[1]), np.zeros(len(labels), bool)

    def block(start: int) -> None:
        part = slice(start, start + ROWS_AT_ONCE)
        values, label = logits[part], labels[part][:, None]
        own = np.take_along_axis(values, label, axis=1)
        rank = np.count_nonzero(~(values <= own) | ((values == own) & (classes < label)), axis=1)
        right[part] = rank < k

    in_threads(block, range(0, len(labels), ROWS_AT_ONCE))
    return float(right.mean())


def evaluate_logits(
    logits: NDArray[Any], labels: Labels, class_names: tuple[str, ...], clip: float = 0.0
) -> Evaluation:
    """Return the metrics of logits [N, num_classes] and labels [N], in float64.

    `temperature` is fitted on all these images; that flatters the calibrated metrics by about 1 / N of log
    loss. log_loss_calibrated and ece_calibrated are those of the probabilities that are served with
    --calibrate, none of them below `clip`; log_loss and ece are without temperature and clip. ROC AUC is of
    the second of two classes, or the mean over one-against-rest; it is left out when a class has no image.
    """
    rows = SoftmaxRows(logits, labels)
    plain = rows.sums(1.0)
    fitted = rows.fit(plain)
    own, top = rows.log_probabilities(plain)
    own_fitted, top_fitted = rows.log_probabilities(fitted, clip)
    correct = rows.predicted == labels
    num_classes = len(class_names)
    counted, f1 = f1_of_classes(labels, rows.predicted, num_classes)
    values = {
        "accuracy": float(correct.mean()),
        **({"top5_accuracy": top_accuracy(logits, labels)} if num_classes >= TOP_FROM else {}),
        "log_loss": float(-own.mean()),
        "ece": calibration_error(top, correct),
        "temperature": 1 / fitted.inverse,
        "log_loss_calibrated": float(-own_fitted.mean()),
        "ece_calibrated": calibration_error(top_fitted, correct),
        "f1_macro": float(f1[counted].mean()),
    }
    if rows.finite and np.bincount(labels, minlength=num_classes).all():
        values["roc_auc"] = mean_roc_auc(rows, plain.log_sum, labels)
    return Evaluation(logits, labels, values)


def f1_of_classes(labels: Labels, predicted: Labels, num_classes: int) -> tuple[NDArray[np.bool_], Floats]:
    """Return which classes are there or were predicted, over which scikit-learn's mean is, and F1 of all
    classes, 0 for the others; both [num_classes]."""
    right, actual, guessed = (
        np.bincount(found, minlength=num_classes)
        for found in (labels[labels == predicted], labels, predicted)
    )
    return actual + guessed > 0, 2 * right / np.maximum(actual + guessed, 1)


def mean_roc_auc(rows: SoftmaxRows, log_sum: Floats, labels: Labels) -> float:
    """Return ROC AUC of the second of two classes, or the mean over one-against-rest.

    Each class has images, and logits are finite.
    """
    order = np.argsort(labels, kind="stable")
    images = np.split(order, np.searchsorted(labels[order], np.arange(1, rows.num_classes)))
    first = 1 if rows.num_classes == 2 else 0
    values = np.zeros(rows.num_classes)

    def block(start: int) -> None:
        stop = min(start + CLASSES_AT_ONCE, rows.num_classes)
        columns = np.empty((stop - start, len(labels)), rows.logits.dtype)
        for row in range(0, len(labels), ROWS_AT_ONCE):  # so many fit a processor's cache
            columns[:, row : row + ROWS_AT_ONCE] = rows.logits[row : row + ROWS_AT_ONCE, start:stop].T
        for label, column in enumerate(columns, start):
            values[label] = area_under_roc(np.exp(column - rows.top - log_sum), images[label])

    in_threads(block, range(first, rows.num_classes, CLASSES_AT_ONCE))
    return float(values[first:].mean())


def area_under_roc(scores: Floats, positive: Labels) -> float:
    """Return the share of pairs of a positive and another image in which the positive one has the higher
    score; equal scores count half.

    Args:
        scores: [N], finite.
        positive: indices of the positive images, neither none nor all.
    """
    own = scores[positive]
    if len(own) <= FEW:
        low, high = own.min(), own.max()
        near = scores[(scores >= low) & (scores <= high)]
        # each positive image against those of `near`, itself among them; all of them beat the lower ones
        wins = sum(np.count_nonzero(near < score) + np.count_nonzero(near <= score) for score in own) / 2
        wins += len(own) * np.count_nonzero(scores < low)
    else:
        ordered = np.sort(scores)
        wins = sum(np.searchsorted(ordered, own, side).sum() for side in ("left", "right")) / 2
    among_themselves = len(own) ** 2 / 2
    return float((wins - among_themselves) / (len(own) * (len(scores) - len(own))))

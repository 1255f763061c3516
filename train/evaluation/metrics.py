"""Validation metrics from the logits of every validation image: exact with any number of processes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.evaluation.calibration import Floats, Labels, calibration_error, fit_temperature, log_confidences

TOP, TOP_FROM = 5, 10  # top-5 accuracy is of ten classes or more
MOST_CLASSES = 40  # a larger confusion matrix cannot be read


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
    own, label = np.take_along_axis(logits, labels[:, None], axis=1), labels[:, None]
    classes = np.arange(logits.shape[1])
    rank = np.count_nonzero(~(logits <= own) | ((logits == own) & (classes < label)), axis=1)
    return float((rank < k).mean())


def evaluate_logits(
    logits: NDArray[Any], labels: Labels, class_names: tuple[str, ...], clip: float = 0.0
) -> Evaluation:
    """Return the metrics of logits [N, num_classes] and labels [N], in float64.

    `temperature` is fitted on all these images; that flatters the calibrated metrics by about 1 / N of log
    loss. log_loss_calibrated and ece_calibrated are those of the probabilities that are served with
    --calibrate, none of them below `clip`; log_loss and ece are without temperature and clip. ROC AUC is of
    the second of two classes, or the mean over one-against-rest; it is left out when a class has no image.
    """
    predicted = logits.argmax(axis=1)
    temperature = fit_temperature(logits, labels)
    own, top = log_confidences(logits, labels)
    own_fitted, top_fitted = log_confidences(logits, labels, temperature, clip)
    correct = predicted == labels
    num_classes = len(class_names)
    counted, f1 = f1_of_classes(labels, predicted, num_classes)
    values = {
        "accuracy": float(correct.mean()),
        **({"top5_accuracy": top_accuracy(logits, labels)} if num_classes >= TOP_FROM else {}),
        "log_loss": float(-own.mean()),
        "ece": calibration_error(top, correct),
        "temperature": temperature,
        "log_loss_calibrated": float(-own_fitted.mean()),
        "ece_calibrated": calibration_error(top_fitted, correct),
        "f1_macro": float(f1[counted].mean()),
    }
    if np.isfinite(logits).all() and np.bincount(labels, minlength=num_classes).all():
        values["roc_auc"] = mean_roc_auc(logits, logits.max(axis=1) - top, labels)
    return Evaluation(logits, labels, values)


def f1_of_classes(labels: Labels, predicted: Labels, num_classes: int) -> tuple[NDArray[np.bool_], Floats]:
    """Return which classes are there or were predicted, over which scikit-learn's mean is, and F1 of all
    classes, 0 for the others; both [num_classes]."""
    right, actual, guessed = (
        np.bincount(found, minlength=num_classes)
        for found in (labels[labels == predicted], labels, predicted)
    )
    return actual + guessed > 0, 2 * right / np.maximum(actual + guessed, 1)


def mean_roc_auc(logits: NDArray[Any], log_sums: Floats, labels: Labels) -> float:
    """Return ROC AUC of the second of two classes, or the mean over one-against-rest.

    `logits`: [N, num_classes], finite; `log_sums`: [N], of their powers; `labels`: [N], each class occurs.
    """
    num_classes = logits.shape[1]
    columns = np.ascontiguousarray(logits.T)

    def of_class(label: int) -> float:
        return area_under_roc(np.exp(columns[label] - log_sums), labels == label)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy releases Python's lock
        first = 1 if num_classes == 2 else 0
        return float(np.mean(list(pool.map(of_class, range(first, num_classes)))))


def area_under_roc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Return the share of pairs of a positive and another image in which the positive one has the higher
    score; equal scores count half. `scores`: [N], finite; `positive`: [N], both values occur."""
    own, ordered = scores[positive], np.sort(scores)
    wins = sum(np.searchsorted(ordered, own, side).sum() for side in ("left", "right")) / 2
    among_themselves = len(own) ** 2 / 2
    return float((wins - among_themselves) / (len(own) * (len(scores) - len(own))))

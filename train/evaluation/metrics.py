"""Validation metrics from the logits of every validation image: exact with any number of processes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.evaluation.calibration import expected_calibration_error, fit_temperature, log_probabilities

TOP, TOP_FROM = 5, 10  # top-5 accuracy is of ten classes or more
MOST_CLASSES = 40  # a larger confusion matrix cannot be read; MLflow draws about 100 metrics


@dataclass(frozen=True)
class Evaluation:
    """Answers of one checkpoint on the whole validation set, and their metrics."""

    logits: NDArray[np.float64]
    """[N, num_classes]"""
    labels: NDArray[np.int64]
    """[N]"""
    values: dict[str, float]
    """Metric name -> value: accuracy, top5_accuracy (of ten classes or more), log_loss, ece, temperature,
    log_loss_calibrated, ece_calibrated, roc_auc, f1_macro, f1/CLASS (up to 40 classes)."""


def top_accuracy(logits: NDArray[np.float64], labels: NDArray[np.int64], k: int = TOP) -> float:
    """Return the share of images whose class is among the `k` likeliest, of equal ones the first.

    `logits`: [N, num_classes], `labels`: [N]. With k = 1 it is the accuracy of argmax. NaN is never right.
    """
    own = logits[np.arange(len(labels)), labels][:, None]
    before = (logits == own) & (np.arange(logits.shape[1]) < labels[:, None])
    rank = (~(logits <= own)).sum(axis=1) + before.sum(axis=1)
    return float((rank < k).mean())


def evaluate_logits(
    logits: NDArray[np.float64], labels: NDArray[np.int64], class_names: tuple[str, ...], clip: float = 0.0
) -> Evaluation:
    """Return the metrics of logits [N, num_classes] and labels [N].

    `temperature` is fitted on all these images; that flatters the calibrated metrics by about 1 / N of log
    loss. log_loss_calibrated and ece_calibrated are those of the probabilities that are served with
    --calibrate, none of them below `clip`; log_loss and ece are without temperature and clip. ROC AUC is of
    the second of two classes, or the mean over one-against-rest; it is left out when a class has no image.
    """
    # a second and a half to import, which the ranks other than 0 need not spend
    from sklearn.metrics import f1_score, roc_auc_score

    classes = list(range(len(class_names)))
    rows = np.arange(len(labels))
    temperature = fit_temperature(logits, labels)
    log_probs, calibrated = log_probabilities(logits), log_probabilities(logits, temperature, clip)
    predicted = logits.argmax(axis=1)
    f1 = f1_score(labels, predicted, labels=classes, average=None, zero_division=0.0)
    values = {
        "accuracy": float((predicted == labels).mean()),
        **({"top5_accuracy": top_accuracy(logits, labels)} if len(classes) >= TOP_FROM else {}),
        "log_loss": float(-log_probs[rows, labels].mean()),
        "ece": expected_calibration_error(log_probs, labels),
        "temperature": temperature,
        "log_loss_calibrated": float(-calibrated[rows, labels].mean()),
        "ece_calibrated": expected_calibration_error(calibrated, labels),
        # as scikit-learn: without classes that neither are there nor were predicted
        "f1_macro": float(f1[np.union1d(labels, predicted)].mean()),
    }
    if len(classes) <= MOST_CLASSES:
        values |= {f"f1/{name}": float(value) for name, value in zip(class_names, f1, strict=True)}
    if len(np.unique(labels)) == len(classes) and np.isfinite(logits).all():
        probabilities = np.exp(log_probs)
        if len(classes) == 2:
            values["roc_auc"] = float(roc_auc_score(labels, probabilities[:, 1]))
        else:
            values["roc_auc"] = float(roc_auc_score(labels, probabilities, multi_class="ovr"))
    return Evaluation(logits, labels, values)

"""Validation metrics from the logits of every validation image: exact, whatever the number of processes."""

import csv
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.index import ImageSet
from train.evaluation.calibration import expected_calibration_error, fit_temperature, log_probabilities


@dataclass(frozen=True)
class Evaluation:
    """Of one checkpoint on the whole validation set."""

    logits: NDArray[np.float64]
    """[N, num_classes]"""
    labels: NDArray[np.int64]
    """[N]"""
    values: dict[str, float]
    """Metric name -> value: accuracy, log_loss, ece, temperature, log_loss_calibrated, ece_calibrated,
    roc_auc, f1_macro, f1/CLASS."""
    confusion: NDArray[np.int64]
    """[true class, predicted class]"""

    @property
    def log_probabilities(self) -> NDArray[np.float64]:
        return log_probabilities(self.logits)


def evaluate_logits(
    logits: NDArray[np.float64], labels: NDArray[np.int64], class_names: tuple[str, ...], clip: float = 0.0
) -> Evaluation:
    """
    Args:
        logits: [N, num_classes].
        labels: [N].
        clip: smallest probability of the calibrated metrics.

    `temperature` is fitted on all these images. log_loss_calibrated and ece_calibrated are those of the
    probabilities that are served with it: with --calibrate, those of val_predictions.csv. As one number is
    fitted, measuring on the same images flatters by about 1 / N of log loss. log_loss and ece are without
    temperature and clip. ROC AUC is of the second of two classes, or the mean over one-against-rest; it is
    left out when a class has no validation image.
    """
    # a second and a half to import, which the ranks other than 0 need not spend
    from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score

    classes = list(range(len(class_names)))
    rows = np.arange(len(labels))
    temperature = fit_temperature(logits, labels)
    log_probs, calibrated = log_probabilities(logits), log_probabilities(logits, temperature, clip)
    predicted = logits.argmax(axis=1)
    f1 = f1_score(labels, predicted, labels=classes, average=None, zero_division=0.0)
    values = {
        "accuracy": float((predicted == labels).mean()),
        "log_loss": float(-log_probs[rows, labels].mean()),
        "ece": expected_calibration_error(log_probs, labels),
        "temperature": temperature,
        "log_loss_calibrated": float(-calibrated[rows, labels].mean()),
        "ece_calibrated": expected_calibration_error(calibrated, labels),
        # as scikit-learn: without classes that neither are there nor were predicted
        "f1_macro": float(f1[np.union1d(labels, predicted)].mean()),
        **{f"f1/{name}": float(value) for name, value in zip(class_names, f1, strict=True)},
    }
    if len(np.unique(labels)) == len(classes) and np.isfinite(logits).all():
        probabilities = np.exp(log_probs)
        if len(classes) == 2:
            values["roc_auc"] = float(roc_auc_score(labels, probabilities[:, 1]))
        else:
            values["roc_auc"] = float(roc_auc_score(labels, probabilities, multi_class="ovr"))
    confusion = confusion_matrix(labels, predicted, labels=classes)
    return Evaluation(logits, labels, values, confusion)


def write_predictions(
    path: Path, images: ImageSet, evaluation: Evaluation, temperature: float = 1.0, clip: float = 0.0
) -> None:
    """Columns path, label, prediction, correct, loss, probability_CLASS for each class: what the exported
    model says of the validation images."""
    names = images.class_names
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        # texts in quotes: without them a carriage return in a file name would end the row
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(
            ["path", "label", "prediction", "correct", "loss", *(f"probability_{n}" for n in names)]
        )
        log_probs = log_probabilities(evaluation.logits, temperature, clip)
        rows = csv.writer(file, lineterminator="", quoting=csv.QUOTE_NONNUMERIC)
        for i, image in enumerate(images.paths):
            label, predicted = int(evaluation.labels[i]), int(log_probs[i].argmax())
            loss = float(f"{-log_probs[i, label]:.6f}")
            rows.writerow([image, names[label], names[predicted], int(label == predicted), loss])
            file.write("".join([f",{p:.8g}" for p in np.exp(log_probs[i]).tolist()]) + "\n")
    temporary.replace(path)


def read_predictions(path: Path, images: ImageSet) -> Evaluation:
    """What `write_predictions` wrote; logits are log probabilities, which give the same metrics."""
    names = images.class_names
    probabilities = np.empty((len(images), len(names)))
    labels = np.empty(len(images), np.int64)
    numbers = {name: i for i, name in enumerate(names)}
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.reader(file)
        header = next(table)
        assert header[-len(names) :] == [f"probability_{name}" for name in names], f"{path}: other classes"
        for i, (row, image) in enumerate(zip_longest(table, images.paths)):
            assert (row or [None])[0] == image, f"{path} is of other images"
            labels[i] = numbers[row[1]]
            probabilities[i] = row[-len(names) :]
    return evaluate_logits(np.log(np.maximum(probabilities, 1e-45)), labels, names)

"""Tables of classes: per_class.csv, and confusion_pairs.csv where a confusion matrix cannot be read."""

from math import isfinite, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.evaluation.metrics import MOST_CLASSES, f1_of_classes
from train.evaluation.predictions import Predictions
from train.evaluation.significance import Interval, f1_intervals, share_interval
from train.evaluation.tables import write_table

PER_CLASS, CONFUSION_PAIRS = "per_class.csv", "confusion_pairs.csv"


class Confusion(NamedTuple):
    """Validation images of one class that were taken for one other class."""

    label: str
    prediction: str
    images: int
    share: float
    """Of the images of the class `label`."""


def confusions(predictions: Predictions) -> list[Confusion]:
    """Return every pair of classes that was confused, the most frequent first.

    Memory is that of the images, not of a matrix: with 10,000 classes one would have 800 MB.
    """
    names, wrong = predictions.class_names, ~predictions.correct
    totals = np.bincount(predictions.labels, minlength=len(names))
    pairs = np.stack([predictions.labels[wrong], predictions.predicted[wrong]], axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
        Confusion(names[label], names[guess], int(count), float(count / totals[label]))
        for (label, guess), count in zip(found[order].tolist(), counts[order], strict=True)
    ]


def class_rows(predictions: Predictions) -> list[dict[str, Any]]:
    """Return a row of per_class.csv for each class, the lowest F1 first."""
    names = predictions.class_names
    images, predicted, correct = (
        np.bincount(labels, minlength=len(names))
        for labels in (predictions.labels, predictions.predicted, predictions.labels[predictions.correct])
    )
    _, f1 = f1_of_classes(predictions.labels, predictions.predicted, len(names))
    return [
        {
            "class": names[i],
            "images": int(images[i]),
            "predicted": int(predicted[i]),
            "correct": int(correct[i]),
            "precision": float(correct[i] / predicted[i]) if predicted[i] else None,
            "recall": float(correct[i] / images[i]) if images[i] else None,
            "f1": float(f1[i]),
        }
        for i in np.argsort(f1, kind="stable").tolist()
    ]


def class_intervals(predictions: Predictions) -> tuple[list[dict[str, Any]], Interval]:
    """Return the rows of `class_rows` with METRIC_low and METRIC_high of precision, recall and F1 (None
    where the data hold no interval) and with the class that each is mostly taken for; and macro F1."""
    names, taken_for = predictions.class_names, dict[str, str]()
    *f1, macro = f1_intervals(predictions.labels, predictions.predicted, len(names))
    f1_of = dict(zip(names, f1, strict=True))
    for pair in confusions(predictions):  # the most frequent first
        taken_for.setdefault(pair.label, pair.prediction)
    rows = class_rows(predictions)
    for row in rows:
        found = {"f1": f1_of[row["class"]]}
        for metric, total in (("precision", row["predicted"]), ("recall", row["images"])):
            if total:
                found[metric] = share_interval(row["correct"], total)
        for metric in ("precision", "recall", "f1"):
            ends = found[metric][1:] if metric in found else (nan, nan)
            low, high = (end if isfinite(end) else None for end in ends)
            row |= {f"{metric}_low": low, f"{metric}_high": high}
        row["taken_for"] = taken_for.get(row["class"])
    return rows, macro


def write_class_tables(folder: Path, predictions: Predictions) -> list[str]:
    """Write per_class.csv, the lowest F1 first, and above 40 classes confusion_pairs.csv; return lines that
    report them."""
    names = predictions.class_names
    write_table(folder / PER_CLASS, class_rows(predictions))
    if len(names) <= MOST_CLASSES:
        return []
    pairs = confusions(predictions)
    write_table(folder / CONFUSION_PAIRS, [pair._asdict() for pair in pairs], Confusion._fields)
    most = ", ".join(f"{p.label!r} taken for {p.prediction!r} {p.images} times" for p in pairs[:3])
    return [
        f"{len(names)} classes: {CONFUSION_PAIRS} replaces the confusion matrix; most frequent confusions: "
        f"{most or 'none'}"
    ]

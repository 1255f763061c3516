"""Likely wrong labels by the predictions of models that are good enough to judge them.

Method: confident learning (arXiv 1911.00068) as implemented by its authors in cleanlab. With models at
chance it would list half of all labels. Hence three conditions:

1. A fold's model is surely better than always naming the largest class; or all models together are, and its
   accuracy is not surely lower than the others'.
2. At most a quarter of the labels are listed.
3. A class of whose labels more than a quarter are listed is judged only if the models surely tell it from
   the class that they take its images for, and at most half of its labels are listed.
"""

from dataclasses import dataclass

import numpy as np
from cleanlab.count import num_label_issues
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from numpy.typing import NDArray
from scipy.stats import fisher_exact

from pipelines.folds import OutOfFold
from serve.contract.errors import UserError
from train.data.labels import listed
from train.evaluation.significance import CONFIDENCE, Bools, better_than_largest

FILTER = "prune_by_noise_rate"  # takes as many images of each class as the counts say are wrong
MOST_LISTED = 0.25
CURE = "train the models longer, with --weights or on more images"


@dataclass(frozen=True)
class LabelIssues:
    found: NDArray[np.int64]
    """Indices of the likely errors, the least plausible label first."""
    scores: NDArray[np.float64]
    """[N], 0 to 1: (p(label) - the largest other probability + 1) / 2; NaN: not judged"""
    estimate: int
    """Number of wrong labels by the counts of the confident joint; it may differ from that of `found`."""
    judged: Bools
    """[N], whether an image's label was judged."""
    folds_at_chance: list[int]
    """Folds whose images are not judged."""
    unknown_classes: list[int]
    """Classes that are neither judged nor suggested."""


def find_issues(data: OutOfFold) -> LabelIssues:
    """Return the labels that contradict the models' predictions.

    A class's threshold is the mean probability of the class for its images. Images above another class's
    threshold are counted, and as many of the least plausible labels are listed.

    Raises:
        UserError: no model, or no two classes, fulfil the conditions.
    """
    labels, probabilities = data.labels, data.probabilities
    if len(np.unique(labels)) < 2:
        raise UserError("the folds hold images of one class only, and labels need two")
    at_chance = _folds_at_chance(data)
    judged = ~np.isin(data.folds, at_chance)
    if not judged.any():
        raise UserError(
            f"the folds' models are not surely better than always naming the largest class (accuracy "
            f"{data.accuracy:.4f} on {len(labels)} images), so they cannot judge labels: {CURE}"
        )
    suspect, scores = np.zeros(len(labels), bool), np.full(len(labels), np.nan)
    scores[judged] = get_label_quality_scores(
        labels[judged], probabilities[judged], method="normalized_margin"
    )
    suspect[judged] = find_label_issues(labels[judged], probabilities[judged], filter_by=FILTER, n_jobs=1)
    share = suspect.sum() / judged.sum()
    if share > MOST_LISTED:
        raise UserError(
            f"{share:.0%} of the labels would be listed, more than {MOST_LISTED:.0%}: the models (accuracy "
            f"{data.accuracy:.4f} on {len(labels)} images) cannot judge labels; {CURE}"
        )
    unknown = _unknown_classes(labels, probabilities, suspect, judged)
    judged &= ~np.isin(labels, unknown)
    if len(np.unique(labels[judged])) < 2:
        names = listed([data.class_names[label] for label in unknown])
        raise UserError(
            f"more than {MOST_LISTED:.0%} of the labels of {names} would be listed: the models do not know "
            f"these classes, and no two others are left; {CURE}"
        )
    found = np.flatnonzero(suspect & judged & ~np.isin(probabilities.argmax(axis=1), unknown))
    estimate = num_label_issues(
        labels[judged], probabilities[judged], estimation_method="off_diagonal_calibrated"
    )
    order = np.argsort(scores[found], kind="stable")
    return LabelIssues(found[order], scores, int(estimate), judged, at_chance, unknown)


def _folds_at_chance(data: OutOfFold) -> list[int]:
    labels = data.labels
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(data.probabilities).all(axis=1))
    correct = finite & (data.probabilities.argmax(axis=1) == labels)
    together = better_than_largest(correct, labels)
    at_chance = []
    for fold in np.unique(data.folds).tolist():
        mine = data.folds == fold
        table = [[(correct & part).sum(), (~correct & part).sum()] for part in (mine, ~mine)]
        lower = fisher_exact(table, alternative="less").pvalue < 1 - CONFIDENCE
        skilled = better_than_largest(correct[mine], labels[mine]) or (together and not lower)
        if not (skilled and np.isfinite(data.probabilities[mine]).all()):
            at_chance.append(fold)
    return at_chance


def _unknown_classes(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64], suspect: Bools, judged: Bools
) -> list[int]:
    """Return the classes that do not fulfil the third condition; one label of each may always be listed."""
    unknown = []
    for label in np.unique(labels[suspect]).tolist():
        mine = labels == label
        count, size = (mine & suspect).sum(), (mine & judged).sum()
        if count > max(1, MOST_LISTED * size):
            other = np.bincount(probabilities[mine & suspect].argmax(axis=1)).argmax()
            both = judged & (mine | (labels == other))
            named = np.where(probabilities[both, label] > probabilities[both, other], label, other)
            if count > size / 2 or not better_than_largest(named == labels[both], labels[both]):
                unknown.append(label)
    return unknown

"""What a report shows of predictions: worst images, confusions, calibration, coverage, slices."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.evaluation.calibration import BINS, confidence_bins
from train.evaluation.classes import Confusion, confusions
from train.evaluation.metrics import MOST_CLASSES
from train.evaluation.predictions import Predictions
from train.evaluation.significance import Interval, accuracy_interval
from train.evaluation.thumbnails import Seen

MOST_WORST = 60
MOST_SUSPICIOUS = 24
MOST_PAIRS_SHOWN, IMAGES_OF_PAIR = 12, 4
MOST_FOLDERS = 20
THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
SIDES = (128, 256, 512, 1024)  # of slices by the short side, in pixels
ASPECTS = (0.8, 1.25)
LEVELS = (85, 170)  # of brightness, 0 to 255


class Bin(NamedTuple):
    """Images whose likeliest class has a probability in one of the BINS of the calibration error."""

    low: float
    high: float
    images: int
    confidence: float
    """Mean probability of the likeliest class."""
    accuracy: Interval


class Covered(NamedTuple):
    """What is answered if answers below a probability are withheld."""

    probability: float
    images: int
    share: float
    accuracy: Interval | None
    """None of no images."""


class Slice(NamedTuple):
    name: str
    images: int
    accuracy: Interval


class PairOfClasses(NamedTuple):
    confusion: Confusion
    images: list[int]
    """Some of them, the surest answers first."""


@dataclass(frozen=True)
class ReportedAnswers:
    """Images are named by their position in the predictions."""

    worst: list[int]
    """The lowest probability of their label first."""
    suspicious: list[int]
    """The clearest contradictions of their label first."""
    num_suspicious: int
    pairs: list[PairOfClasses]
    num_pairs: int
    matrix: list[list[int]]
    """By true and predicted class; empty above MOST_CLASSES."""
    bins: list[Bin]
    coverage: list[Covered]
    curve: list[tuple[float, float]]
    """(share of the images that is answered, accuracy of these answers)"""
    folders: list[Slice]
    """The surely worst first; empty where each folder has one class."""
    num_folders: int

    @property
    def shown(self) -> list[int]:
        """Images of which the report has thumbnails, in the order of their importance."""
        pairs = [i for pair in self.pairs for i in pair.images]
        return list(dict.fromkeys([*self.worst, *self.suspicious, *pairs]))


def look_at(predictions: Predictions) -> ReportedAnswers:
    """Return what a report shows of predictions, without reading an image."""
    p, rows = predictions, np.arange(len(predictions.paths))
    confidence, own = p.probabilities[rows, p.predicted], p.probabilities[rows, p.labels]
    suspicious, pairs, folders = likely_wrong_labels(p), confusions(p), _folders(p)
    images = _by_pair(p, confidence)
    return ReportedAnswers(
        np.argsort(own, kind="stable")[:MOST_WORST].tolist(),
        suspicious[:MOST_SUSPICIOUS],
        len(suspicious),
        [PairOfClasses(pair, images[pair.label, pair.prediction]) for pair in pairs[:MOST_PAIRS_SHOWN]],
        len(pairs),
        p.confusion.tolist() if len(p.class_names) <= MOST_CLASSES else [],
        reliability(confidence, p.correct),
        coverage(confidence, p.correct),
        coverage_curve(confidence, p.correct),
        folders[:MOST_FOLDERS],
        len(folders),
    )


def likely_wrong_labels(predictions: Predictions) -> list[int]:
    """Return images whose label a sure answer contradicts, the clearest first.

    The rule is confident learning's (arXiv 1911.00068): the answer's probability is at least the mean one
    that images with this label get for it; and it is above one half.
    """
    p, rows = predictions, np.arange(len(predictions.paths))
    guess, own = p.probabilities[rows, p.predicted], p.probabilities[rows, p.labels]
    totals = np.bincount(p.labels, minlength=len(p.class_names))
    sums = np.bincount(p.labels, weights=own, minlength=len(p.class_names))
    usual = np.where(totals > 0, sums / np.maximum(totals, 1), np.inf)
    found = np.flatnonzero(~p.correct & (guess >= usual[p.predicted]) & (guess > 0.5))
    ordered: list[int] = found[np.argsort((own - guess)[found], kind="stable")].tolist()
    return ordered


def _by_pair(p: Predictions, confidence: NDArray[np.float64]) -> dict[tuple[str, str], list[int]]:
    images = defaultdict[tuple[str, str], list[int]](list)
    wrong = np.flatnonzero(~p.correct)
    for i in wrong[np.argsort(-confidence[wrong], kind="stable")].tolist():
        pair = images[p.class_names[p.labels[i]], p.class_names[p.predicted[i]]]
        if len(pair) < IMAGES_OF_PAIR:
            pair.append(i)
    return images


def reliability(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> list[Bin]:
    """Return the bins that hold images. `confidence` and `correct`: [N]."""
    numbers = confidence_bins(confidence)
    return [
        Bin(
            b / BINS,
            (b + 1) / BINS,
            int(own.sum()),
            float(confidence[own].mean()),
            accuracy_interval(correct[own]),
        )
        for b in np.unique(numbers).tolist()
        for own in [numbers == b]
    ]


def coverage(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> list[Covered]:
    """Return a row for each of THRESHOLDS. `confidence` and `correct`: [N], N > 0."""
    rows = []
    for threshold in THRESHOLDS:
        answered = confidence >= threshold
        n = int(answered.sum())
        accuracy = accuracy_interval(correct[answered]) if n else None
        rows.append(Covered(threshold, n, n / len(correct), accuracy))
    return rows


def coverage_curve(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_]
) -> list[tuple[float, float]]:
    """Return (share, accuracy) of the surest answers, at each probability that occurs. Arrays are [N]."""
    order = np.argsort(-confidence, kind="stable")
    counts, right = np.arange(1, len(order) + 1), np.cumsum(correct[order])
    last = np.append(np.diff(confidence[order]) < 0, True)  # equal probabilities are answered together
    return list(zip((counts / len(order))[last].tolist(), (right / counts)[last].tolist(), strict=True))


def _folders(p: Predictions) -> list[Slice]:
    groups = defaultdict[str, list[int]](list)
    for i, path in enumerate(p.paths):
        groups[path.rpartition("/")[0]].append(i)
    if all(len(np.unique(p.labels[images])) == 1 for images in groups.values()):
        return []
    found = [
        Slice(name or ".", len(own), accuracy_interval(p.correct[own])) for name, own in groups.items()
    ]
    return sorted(found, key=lambda each: each.accuracy.high)


def slices(
    predictions: Predictions, seen: Mapping[int, Seen], sample: Sequence[int]
) -> dict[str, list[Slice]]:
    """Return accuracy by size, aspect and brightness, of the images of the sample that could be read."""
    correct = predictions.correct
    read = [i for i in sample if i in seen]
    tables = {}
    for title, limits, values in (
        ("short side, pixels", SIDES, [min(seen[i].width, seen[i].height) for i in read]),
        ("width by height", ASPECTS, [seen[i].width / seen[i].height for i in read]),
        ("mean grey level, 0 to 255", LEVELS, [seen[i].brightness for i in read]),
    ):
        ends = [f"{limit:g}" for limit in limits]
        names = [f"below {ends[0]}", *(f"{a} to {b}" for a, b in pairwise(ends))]
        names.append(f"{ends[-1]} and more")
        groups = np.digitize(values, limits)
        tables[title] = [
            Slice(
                names[k], int((groups == k).sum()), accuracy_interval(correct[np.array(read)[groups == k]])
            )
            for k in np.unique(groups).tolist()
        ]
    return tables

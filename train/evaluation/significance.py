"""Intervals of metrics, and paired tests of two runs on the same validation images.

All of them take the images as independent draws. They do not cover that a run's best epoch was chosen on
the same images (each figure is a little too good), nor what another seed would give.
"""

from collections.abc import Callable, Sequence
from math import nan, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import binomtest, norm, rankdata, t

from train.evaluation.calibration import binned_error, confidence_bins
from train.evaluation.metrics import f1_of_classes

CONFIDENCE = 0.95
RESAMPLES = 1000
RESAMPLED_IMAGES = 2 * 10**7  # in all; of many images there are fewer resamples, down to a fifth

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Interval(NamedTuple):
    """A value with its 95 % interval; low and high are NaN where the data hold no interval."""

    value: float
    low: float
    high: float


class PairedTest(NamedTuple):
    """A run against a reference, on the images that both have; differences are run minus reference."""

    num_images: int
    gained: int
    """Images that only the run has right."""
    lost: int
    """Images that only the reference has right."""
    p: float
    """McNemar's exact two-sided test of equal accuracy."""
    accuracy: Interval
    """Difference of accuracy, with Tango's score interval."""
    log_loss: Interval
    """Mean difference of the images' losses, with Student's interval."""


def accuracy_interval(correct: Bools) -> Interval:
    """Return Wilson's score interval. `correct`: [N], N > 0."""
    return share_interval(int(correct.sum()), len(correct))


def share_interval(hits: int, n: int) -> Interval:
    """Return `accuracy_interval` of a number of right ones among `n`."""
    low, high = binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(hits / n, float(low), float(high))


def gain_over_largest(correct: Bools, labels: NDArray[np.int64]) -> Interval:
    """Return the difference of accuracy to always naming the largest class, paired by image.

    A model is surely better when the interval lies above 0. `correct` and `labels`: [N], N > 0.
    """
    largest = labels == np.bincount(labels).argmax()
    gained, lost = int((correct & ~largest).sum()), int((~correct & largest).sum())
    return paired_interval(gained, lost, len(labels))


def better_than_largest(correct: Bools, labels: NDArray[np.int64]) -> bool:
    """Whether a model is surely better than always naming the largest class."""
    return gain_over_largest(correct, labels).low > 0


def mean_interval(values: Floats) -> Interval:
    """Return Student's interval of a mean, for log loss or a difference of it. `values`: [N], N > 0."""
    mean, n = float(values.mean()), len(values)
    if n < 2 or not np.isfinite(values).all():
        return Interval(mean, nan, nan)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / sqrt(n))
    return Interval(mean, mean - half, mean + half)


def roc_auc_interval(labels: Integers, scores: Floats) -> Interval:
    """Return ROC AUC of the second of two classes, or the mean over one-against-rest of more, with DeLong's
    variance (10.2307/2531595) and the interval on the logit scale.

    Each image's influence on a mean is the sum of its influences on each class. Classes that are separated
    completely leave no variance to estimate, hence no interval. `labels`: [N], each class occurs; `scores`:
    [N, num_classes], equal ones count half.
    """
    num_classes = scores.shape[1]
    classes = [1] if num_classes == 2 else range(num_classes)
    aucs, influence = [], np.zeros(len(labels))
    for c in classes:
        positive = labels == c
        above, below, ranks = scores[positive, c], scores[~positive, c], rankdata(scores[:, c])
        wins = (ranks[positive] - rankdata(above)) / len(below)  # of each against the other images
        losses = 1 - (ranks[~positive] - rankdata(below)) / len(above)
        aucs.append(wins.mean())
        for images, shares in ((positive, wins), (~positive, losses)):
            n = len(shares)
            influence[images] += (shares - shares.mean()) / sqrt(n * max(1, n - 1))
    auc = float(np.mean(aucs))
    if np.bincount(labels, minlength=num_classes).min() < 2 or not 0 < auc < 1:
        return Interval(auc, nan, nan)
    deviation = sqrt(float((influence**2).sum())) / len(aucs)
    half = norm.ppf((1 + CONFIDENCE) / 2) * deviation / (auc * (1 - auc))
    return Interval(auc, *expit(logit(auc) + half * np.array([-1, 1])).tolist())


def f1_intervals(labels: Integers, predicted: Integers, num_classes: int) -> list[Interval]:
    """Return F1 of each class and, last, their mean, with intervals by the bootstrap's standard deviation.

    The bootstrap's percentiles need not hold the value: resamples of few images a class have lower F1.
    The mean is over classes that are there or were predicted, as scikit-learn's. `labels` and `predicted`:
    [N], N > 0.
    """

    def f1(chosen: Integers) -> Floats:
        counted, values = f1_of_classes(labels[chosen], predicted[chosen], num_classes)
        return np.append(values, values[counted].mean())

    values, deviations = f1(np.arange(len(labels))), _resampled(f1, len(labels)).std(axis=0)
    half = norm.ppf((1 + CONFIDENCE) / 2) * np.where(deviations > 0, deviations, nan)
    low, high = np.maximum(values - half, 0.0), np.minimum(values + half, 1.0)
    return [Interval(*each) for each in zip(values.tolist(), low.tolist(), high.tolist(), strict=True)]


def ece_interval(confidence: Floats, correct: Bools) -> Interval:
    """Return the expected calibration error with a bootstrap interval, reflected at the value.

    Resampling adds to the error as much as drawing the images did. The interval begins at 0 unless the
    error is larger than that of calibrated answers as sure as these would be (consistency resampling,
    Weather and Forecasting 22:651, 2007). `confidence`, of the likeliest class, and `correct`: [N], N > 0.
    """
    random, bins = np.random.default_rng(1), confidence_bins(confidence)

    def ece(chosen: Integers) -> Floats:
        sure, of_bin = confidence[chosen], bins[chosen]
        calibrated = random.random(len(chosen)) < sure
        return np.array([binned_error(of_bin, each - sure) for each in (correct[chosen], calibrated)])

    value = float(ece(np.arange(len(correct)))[0])
    resampled, by_chance = _resampled(ece, len(correct)).T
    high, low = 2 * value - np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    if value <= np.quantile(by_chance, (1 + CONFIDENCE) / 2):
        low = 0.0
    return Interval(value, max(0.0, float(low)), min(1.0, max(value, float(high))))


def _resampled(statistic: Callable[[Integers], Floats], n: int) -> Floats:
    """Return [R, K] values of a statistic on R resamples of n images, the same at every call."""
    count = max(RESAMPLES // 5, min(RESAMPLES, RESAMPLED_IMAGES // n))
    random = np.random.default_rng(0)
    return np.stack([statistic(random.integers(0, n, n)) for _ in range(count)])


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p value: with equal accuracy each discordant image is a fair coin."""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def paired_interval(gained: int, lost: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Return Tango's score interval of (gained - lost) / n (Statistics in Medicine 17:891, 1998).

    It holds the differences that the score test does not reject; at 0 that test is McNemar's without
    continuity correction. Unlike the textbook interval it has a width when no image is discordant.
    """
    z = float(norm.ppf((1 + confidence) / 2))
    value = (gained - lost) / n

    def excess(difference: float) -> float:
        """Return the score test's numerator minus z standard errors; its roots are the bounds."""
        # most likely share of lost images, given the difference: the root of a quadratic
        a = 2 * n
        b = (2 * n - gained + lost) * difference - gained - lost
        c = -lost * difference * (1 - difference)
        share = (sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = n * max(0.0, 2 * share + difference * (1 - difference))
        return abs(gained - lost - n * difference) - z * sqrt(variance)

    beside = 1e-9  # at the value itself the excess can be exactly 0, which is no bound
    low = -1.0 if value == -1 else brentq(excess, -1.0, value - beside)
    high = 1.0 if value == 1 else brentq(excess, value + beside, 1.0)
    return Interval(value, float(low), float(high))


def paired_test(run: Bools, reference: Bools, run_losses: Floats, reference_losses: Floats) -> PairedTest:
    """Compare two runs by whether each image is right and its loss; four arrays [N], N > 0."""
    gained, lost = int((run & ~reference).sum()), int((~run & reference).sum())
    return PairedTest(
        len(run),
        gained,
        lost,
        mcnemar(gained, lost),
        paired_interval(gained, lost, len(run)),
        mean_interval(run_losses - reference_losses),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values by Holm's correction: those below 0.05 hold all together with 95 % confidence."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted: Floats = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1, p[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in adjusted]

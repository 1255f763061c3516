"""Intervals of metrics, and paired tests of two runs on the same validation images.

All of them take the images as independent draws. They do not cover that a run's best epoch was chosen on
the same images (each figure is a little too good), nor what another seed would give.
"""

from collections.abc import Sequence
from math import nan, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import binomtest, norm, rankdata, t

CONFIDENCE = 0.95

Floats = NDArray[np.float64]
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
    hits, n = int(correct.sum()), len(correct)
    low, high = binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(hits / n, float(low), float(high))


def better_than_largest(correct: Bools, labels: NDArray[np.int64]) -> bool:
    """Whether a model is surely better than always naming the largest class: the interval of the difference
    of accuracy on these images lies above 0. `correct` and `labels`: [N], N > 0."""
    largest = labels == np.bincount(labels).argmax()
    gained, lost = int((correct & ~largest).sum()), int((~correct & largest).sum())
    return paired_interval(gained, lost, len(labels)).low > 0


def mean_interval(values: Floats) -> Interval:
    """Return Student's interval of a mean, for log loss or a difference of it. `values`: [N], N > 0."""
    mean, n = float(values.mean()), len(values)
    if n < 2 or not np.isfinite(values).all():
        return Interval(mean, nan, nan)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / sqrt(n))
    return Interval(mean, mean - half, mean + half)


def auc_interval(positive: Bools, scores: Floats) -> Interval:
    """Return ROC AUC with DeLong's variance (10.2307/2531595), its interval on the logit scale.

    Classes that are separated completely leave no variance to estimate, hence no interval.

    Args:
        positive: [N], both values occur.
        scores: [N], higher for the positive class; equal scores count half.
    """
    above, below = scores[positive], scores[~positive]
    ranks = rankdata(scores)
    # the share of negative images below each positive one, and of positive images above each negative one
    wins = (ranks[positive] - rankdata(above)) / len(below)
    losses = (ranks[~positive] - rankdata(below)) / len(above)
    auc = float(wins.mean())
    if min(len(above), len(below)) < 2 or not 0 < auc < 1:
        return Interval(auc, nan, nan)
    deviation = sqrt(wins.var(ddof=1) / len(above) + losses.var(ddof=1) / len(below))
    half = norm.ppf((1 + CONFIDENCE) / 2) * deviation / (auc * (1 - auc))
    return Interval(auc, *expit(logit(auc) + half * np.array([-1, 1])).tolist())


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

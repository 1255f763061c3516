"""Accuracy of images without labels: average thresholded confidence (Garg et al., arXiv 2201.04234).

Of the validation answers, as many lie above a threshold as are right. The share of other answers above it
estimates how many of those are right. An answer that is sure and wrong counts as right: images of a class
that the model does not know can look sure.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_IMAGES = 200  # of fewer, the interval says little more than the validation accuracy does
Z_INTERVAL = 1.96  # 95 %
Z_WARNING = 2.576  # 99 %: jobs run daily


@dataclass(frozen=True)
class Threshold:
    """The threshold of a model file on a provider, and the validation answers that it was taken from."""

    probability: float
    """An answer lies above it when its likeliest class has a larger probability."""
    num_images: int
    right: int
    above: int
    """As many as are right, but for equal probabilities."""
    disagreed: int
    """Right ones that do not lie above, and wrong ones that do."""

    def __post_init__(self) -> None:
        counts = (self.right, self.above, self.disagreed)
        whole = all(type(n) is int and 0 <= n <= self.num_images for n in (*counts, self.num_images))
        if not whole or self.num_images < 1 or not 0 <= self.probability <= 1:
            raise TypeError(f"threshold {self}")

    @property
    def accuracy(self) -> float:
        """That of the validation answers."""
        return self.right / self.num_images


@dataclass(frozen=True)
class Estimate:
    """Estimated accuracy of answers without labels, with its 95 % interval."""

    accuracy: float
    low: float
    high: float
    differs: bool
    """Whether it differs from the validation accuracy by more than chance (99 %)."""


def fit_threshold(probabilities: NDArray[np.float32], right: NDArray[np.bool_]) -> Threshold:
    """Return the threshold of validation answers: probabilities of their classes [N], whether right [N]."""
    values, counts = np.unique(probabilities.astype(np.float64), return_counts=True)
    between = (values[:-1] + values[1:]) / 2  # away from both: another batch changes the last digit
    candidates = np.concatenate([values[:1] * (1 - 1e-4), between, values[-1:]])
    above = len(probabilities) - np.concatenate([[0], np.cumsum(counts)])
    chosen = float(candidates[np.abs(above - right.sum()).argmin()])
    is_above = probabilities > chosen
    disagreed = int((is_above != right).sum())
    return Threshold(chosen, len(right), int(right.sum()), int(is_above.sum()), disagreed)


def estimate_accuracy(above: int, num_images: int, threshold: Threshold) -> Estimate | None:
    """Return the accuracy of answers of which `above` lie above the threshold; None for few images.

    The interval has two parts: how well so many images show their share (Wilson's interval, as wide as
    agreement between "above" and "right" in validation demands), and how well the validation images show
    that both shares are equal. The warning compares the shares above the threshold.
    """
    if num_images < MIN_IMAGES:
        return None
    share, of_validation = above / num_images, threshold.above / threshold.num_images
    middle = min(1.0, max(0.0, share + threshold.accuracy - of_validation))
    n, m = num_images, threshold.num_images
    disagreement = (threshold.disagreed + 1) / (m + 2)
    spread = _spread(threshold.right, m)
    low, high = wilson_interval(middle, n / max(1.0, disagreement / spread), Z_INTERVAL)
    unsure = Z_INTERVAL * math.sqrt(disagreement / m)
    difference = abs(share - of_validation)
    chance = math.sqrt(_spread(above, n) / n + _spread(threshold.above, m) / m)
    low = max(0.0, middle - math.hypot(middle - low, unsure))
    high = min(1.0, middle + math.hypot(high - middle, unsure))
    return Estimate(round(middle, 6), round(low, 6), round(high, 6), difference > Z_WARNING * chance)


def _spread(hits: int, n: int) -> float:
    """Return the variance of one image, by a share that is moved off 0 and 1."""
    share = (hits + 1) / (n + 2)
    return share * (1 - share)


def wilson_interval(share: float, n: float, z: float) -> tuple[float, float]:
    """Return Wilson's score interval of a share of n (Wilson 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return min(share, centre - half), max(share, centre + half)

"""Calibrated probabilities: temperature scaling, clipping, and the calibration error."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
TEMPERATURES = (0.05, 20.0)
TOLERANCE = 1e-5  # of the temperature's logarithm
MOST_TRIALS = 60  # of temperatures; five are enough where the optimum is not at the end of a range
BINS = 15
BLOCK = 2**15 - 1  # elements: they fit a processor's cache, and are too few for torch's own threads


class SoftmaxSums(NamedTuple):
    """Sums over the classes of each image, float64 [N], at an inverse temperature b. `x` are the image's
    logits minus the largest of them."""

    inverse: float
    log_sum: Floats
    """log sum exp(b x)"""
    mean: Floats
    """Mean of x, weighted by the softmax of b x."""
    variance: Floats


class SoftmaxRows:
    """Logits [N, num_classes] of images with labels [N], for probabilities at many temperatures."""

    def __init__(self, logits: NDArray[Any], labels: Labels):
        rows = np.arange(len(labels))
        self.logits, self.num_classes = logits, logits.shape[1]
        self.predicted: Labels = logits.argmax(axis=1)
        self.top: Floats = logits[rows, self.predicted].astype(np.float64)
        """The largest logit."""
        self.own: Floats = logits[rows, labels] - self.top
        self.total: Floats = logits.sum(axis=1, dtype=np.float64) - self.num_classes * self.top
        self.finite = bool(np.isfinite(self.total).all())
        """No logit is infinite or NaN."""

    def sums(self, inverse: float, dtype: torch.dtype = torch.float64) -> SoftmaxSums:
        """Return the sums at an inverse temperature, in one pass. Powers are computed in `dtype`."""
        tensor = torch.from_numpy(self.logits)
        top = torch.from_numpy(self.top)[:, None].to(dtype)
        found = np.empty((3, len(tensor)))
        size = max(1, BLOCK // self.num_classes)

        def block(start: int) -> None:
            part = slice(start, start + size)
            x = tensor[part].to(dtype) - top[part]
            weights = (x * inverse).exp_()
            found[0, part] = weights.sum(dim=1, dtype=torch.float64).numpy()
            found[1, part] = (weights := weights.mul_(x)).sum(dim=1, dtype=torch.float64).numpy()
            found[2, part] = weights.mul_(x).sum(dim=1, dtype=torch.float64).numpy()

        in_threads(block, range(0, len(tensor), size))
        with np.errstate(invalid="ignore"):
            mean = found[1] / found[0]
            return SoftmaxSums(inverse, np.log(found[0]), mean, found[2] / found[0] - mean**2)

    def log_probabilities(self, sums: SoftmaxSums, clip: float = 0.0) -> tuple[Floats, Floats]:
        """Return the logarithms of the label's probability and of the likeliest class's, each [N]."""
        own, top = sums.inverse * self.own - sums.log_sum, -sums.log_sum
        return _clipped(own, clip, self.num_classes), _clipped(top, clip, self.num_classes)

    def fit(self, plain: SoftmaxSums) -> SoftmaxSums:
        """Return the sums at the temperature of lowest log loss, given those at 1: see `fit_temperature`.

        The loss is convex in the inverse temperature. Its derivative's root is found by Newton's steps for
        the logarithm, and by halving the range where a step leaves it; in float32, whose error is below
        TOLERANCE.
        """
        n = len(self.own)
        if not n or not self.finite:
            return plain
        doubt, others = 1 / (n + 2), (self.total - self.own) / (self.num_classes - 1)
        wanted = float(((1 - doubt) * self.own + doubt * others).mean())
        first, last = -np.log(TEMPERATURES[1]), -np.log(TEMPERATURES[0])
        low, high, position, sums = -np.inf, np.inf, 0.0, plain
        for _ in range(MOST_TRIALS):
            slope = float(sums.mean.mean()) - wanted
            low, high = (low, position) if slope > 0 else (position, high)
            if slope == 0 or (slope > 0 and position == first) or (slope < 0 and position == last):
                break
            curvature = sums.inverse * float(sums.variance.mean())
            step = slope / curvature if curvature > 0 else np.copysign(np.inf, slope)
            if abs(step) < TOLERANCE or high - low < TOLERANCE:
                break
            position = float(np.clip(position - step, first, last))
            if not low < position < high:
                position = (low + high) / 2
            sums = self.sums(float(np.exp(position)), torch.float32)
        return self.sums(sums.inverse) if position else plain


def in_threads(function: Callable[[int], None], items: range) -> None:
    """Call a function of numpy and torch, which release Python's lock, with all items."""

    def call(part: range) -> None:
        for item in part:
            function(item)

    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1:
        call(items)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(call, (items[i::threads] for i in range(threads))))


def log_probabilities(logits: NDArray[Any], temperature: float = 1.0, clip: float = 0.0) -> Floats:
    """Return log softmax [N, num_classes] of logits of that shape. Each class gets `clip`, and the softmax
    the rest, which keeps their order. `models.classifier.probabilities` is the same in torch."""
    values: Floats = log_softmax(logits.astype(np.float64, copy=False) / temperature, axis=1)
    return _clipped(values, clip, logits.shape[1])


def _clipped(log_probs: Floats, clip: float, num_classes: int) -> Floats:
    if not clip:
        return log_probs
    result: Floats = np.log(clip + (1 - clip * num_classes) * np.exp(log_probs))
    return result


def fit_temperature(logits: NDArray[Any], labels: Labels) -> float:
    """Return the temperature of lowest log loss (arXiv 1706.04599), 1 for no images or bad logits.

    Targets leave 1 / (N + 2) to the other classes, as in Platt's scaling: else the best temperature of
    images that are all classified correctly would be 0.
    """
    if not len(labels):
        return 1.0
    rows = SoftmaxRows(logits, labels)
    return 1 / rows.fit(rows.sums(1.0)).inverse


def expected_calibration_error(log_probs: Floats, labels: Labels) -> float:
    """Return `calibration_error` of log probabilities [N, num_classes]."""
    return calibration_error(log_probs.max(axis=1), log_probs.argmax(axis=1) == labels)


def calibration_error(log_confidence: Floats, correct: NDArray[np.bool_]) -> float:
    """Return the mean over the images of |accuracy - confidence| of their bin: 15 bins of equal width over
    the likeliest class's probability (arXiv 1706.04599). Arrays are [N]."""
    confidence = np.exp(log_confidence)
    if not np.isfinite(confidence).all():
        return float("nan")
    return binned_error(confidence_bins(confidence), correct - confidence)


def confidence_bins(confidence: Floats) -> NDArray[np.int64]:
    """Return the bin of each probability of the likeliest class."""
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def binned_error(bins: NDArray[np.int64], gaps: Floats) -> float:
    """Return the mean over the images of |gap| of their bin; a gap is whether it is right - confidence."""
    return float(np.abs(np.bincount(bins, weights=gaps, minlength=BINS)).sum() / len(bins))

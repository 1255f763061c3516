"""Calibrated probabilities: temperature scaling, clipping, and the calibration error."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_softmax

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
TEMPERATURES = (0.05, 20.0)
TOLERANCE = 1e-5  # of the temperature's logarithm
BINS = 15
NUMBERS_AT_ONCE = 2**21  # whose probabilities are in memory
CACHED = 2**18  # numbers that a processor's cache holds


def log_probabilities(logits: NDArray[Any], temperature: float = 1.0, clip: float = 0.0) -> Floats:
    """Return log softmax [N, num_classes] of logits of that shape. Each class gets `clip`, and the softmax
    the rest, which keeps their order. `models.classifier.probabilities` is the same in torch."""
    values: Floats = log_softmax(logits.astype(np.float64, copy=False) / temperature, axis=1)
    if clip:
        values = np.log(clip + (1 - clip * logits.shape[1]) * np.exp(values))
    return values


def log_probability_blocks(
    logits: NDArray[Any], temperature: float = 1.0, clip: float = 0.0
) -> Iterator[tuple[slice, Floats]]:
    """Yield `log_probabilities` [rows, num_classes] for some rows at a time."""
    size = max(1, NUMBERS_AT_ONCE // logits.shape[1])
    for start in range(0, len(logits), size):
        part = slice(start, start + size)
        yield part, log_probabilities(logits[part], temperature, clip)


def log_confidences(
    logits: NDArray[Any], labels: Labels, temperature: float = 1.0, clip: float = 0.0
) -> tuple[Floats, Floats]:
    """Return the logarithms of the label's probability and of the likeliest class's, each [N]."""
    own, top = np.empty((2, len(labels)))
    for part, log_probs in log_probability_blocks(logits, temperature, clip):
        own[part] = log_probs[np.arange(len(log_probs)), labels[part]]
        top[part] = log_probs.max(axis=1)
    return own, top


def fit_temperature(logits: NDArray[Any], labels: Labels) -> float:
    """Return the temperature of lowest log loss (arXiv 1706.04599), 1 for no images or bad logits.

    Targets leave 1 / (N + 2) to the other classes, as in Platt's scaling: else the best temperature of
    images that are all classified correctly would be 0. The loss is convex in the inverse temperature, and
    the root of its derivative is found in float32, whose error is below TOLERANCE. `logits`:
    [N, num_classes], `labels`: [N].
    """
    if not len(labels) or not np.isfinite(logits).all():
        return 1.0
    x = (logits - logits.max(axis=1, keepdims=True)).astype(np.float32)
    own: Floats = x[np.arange(len(x)), labels].astype(np.float64)
    others = (x.sum(axis=1, dtype=np.float64) - own) / (x.shape[1] - 1)
    doubt = 1 / (len(x) + 2)
    wanted = float(((1 - doubt) * own + doubt * others).mean())
    rows = max(1, CACHED // x.shape[1])
    blocks = [x[start : start + rows] for start in range(0, len(x), rows)]

    def slope(log_inverse: float) -> float:
        inverse = np.float32(np.exp(log_inverse))

        def block_sum(block: NDArray[np.float32]) -> float:
            # below e^-60 weights count for nothing, and numbers near 0 make processors slow
            weights = np.exp(np.maximum(block * inverse, np.float32(-60)))
            return float(((weights * block).sum(axis=1) / weights.sum(axis=1)).sum())

        return sum(pool.map(block_sum, blocks)) / len(x) - wanted

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy releases Python's lock
        at_1 = slope(0.0)
        if at_1 == 0:  # all logits are equal
            return 1.0
        end = -float(np.log(TEMPERATURES[at_1 > 0]))
        found = end if slope(end) * at_1 > 0 else brentq(slope, 0.0, end, xtol=TOLERANCE)
    return float(np.exp(-found))


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

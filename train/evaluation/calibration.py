"""Calibrated probabilities: temperature scaling, clipping, and the calibration error."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
TEMPERATURES = (0.05, 20.0)
BINS = 15


def log_probabilities(logits: Floats, temperature: float = 1.0, clip: float = 0.0) -> Floats:
    """Return log softmax [N, num_classes] of logits of that shape. Each class gets `clip`, and the softmax
    the rest, which keeps their order. `models.classifier.probabilities` is the same in torch."""
    values: Floats = log_softmax(logits / temperature, axis=1)
    if clip:
        values = np.log(clip + (1 - clip * logits.shape[1]) * np.exp(values))
    return values


def fit_temperature(logits: Floats, labels: Labels) -> float:
    """Return the temperature of lowest log loss (arXiv 1706.04599).

    Targets leave 1 / (N + 2) to the other classes, as in Platt's scaling: else the best temperature of
    images that are all classified correctly would be 0.
    """
    n, num_classes = logits.shape
    if not n or not np.isfinite(logits).all():
        return 1.0
    rows, doubt = np.arange(n), 1 / (n + 2)

    def loss(log_temperature: float) -> float:
        values = log_softmax(logits / np.exp(log_temperature), axis=1)
        own = values[rows, labels]
        others = (values.sum(axis=1) - own) / (num_classes - 1)
        return float(-((1 - doubt) * own + doubt * others).mean())

    bounds = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4}).x))


def expected_calibration_error(log_probs: Floats, labels: Labels) -> float:
    """Return the mean over the images of |accuracy - confidence| of their bin: 15 bins of equal width over
    the likeliest class's probability (arXiv 1706.04599)."""
    confidence = np.exp(log_probs.max(axis=1))
    if not np.isfinite(confidence).all():
        return float("nan")
    correct = log_probs.argmax(axis=1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))

"""Probabilities that mean what they say."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from train.evaluation.calibration import (
    TEMPERATURES,
    calibration_error,
    fit_temperature,
    log_probabilities,
)


def honest(n: int, num_classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is the distribution that the labels are drawn from."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, num_classes)) * 2
    labels = np.array([rng.choice(num_classes, p=p) for p in softmax(logits, axis=1)])
    return logits, labels


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_over_and_underconfidence(factor: float) -> None:
    logits, labels = honest(6000)
    assert fit_temperature(logits * factor, labels) == pytest.approx(factor, rel=0.08)


def test_calibration_lowers_log_loss_and_calibration_error_of_images_not_fitted_on() -> None:
    logits, labels = honest(4000)
    logits *= 3
    temperature = fit_temperature(logits[::2], labels[::2])
    before, after = log_probabilities(logits[1::2]), log_probabilities(logits[1::2], temperature)
    rows, others = np.arange(2000), labels[1::2]
    assert -after[rows, others].mean() < -before[rows, others].mean() - 0.1
    errors = [calibration_error(p.max(axis=1), p.argmax(axis=1) == others) for p in (before, after)]
    assert errors[0] > 0.1
    assert errors[1] < 0.04


@pytest.mark.parametrize("num_classes", [2, 5])
def test_perfect_answers_keep_a_doubt(num_classes: int) -> None:
    """Without it the temperature would be 0, and one mistake in production an infinite loss."""
    labels = np.arange(100) % num_classes
    logits = np.eye(num_classes)[labels] * 4
    doubt = 1 - softmax(logits[0] / fit_temperature(logits, labels))[0]
    assert doubt == pytest.approx(1 / 102, rel=0.05)


@pytest.mark.parametrize("case", ["honest", "sure", "unsure", "wrong", "chance", "perfect", "many"])
def test_the_temperature_is_the_minimum_that_a_search_finds(case: str) -> None:
    logits, labels = honest(300, 40 if case == "many" else 3)
    logits *= {"sure": 15.0, "unsure": 0.06}.get(case, 1.0)
    if case == "wrong":
        labels = logits.argmin(axis=1)
    elif case == "chance":
        labels = np.random.default_rng(1).permutation(labels)
    elif case == "perfect":
        labels = logits.argmax(axis=1)
    doubt = 1 / (len(labels) + 2)

    def loss(log_temperature: float) -> float:
        values = log_softmax(logits / np.exp(log_temperature), axis=1)
        own = values[np.arange(len(labels)), labels]
        others = (values.sum(axis=1) - own) / (logits.shape[1] - 1)
        return float(-((1 - doubt) * own + doubt * others).mean())

    found = fit_temperature(logits, labels)
    bounds = np.log(TEMPERATURES)
    best = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    assert np.log(found) == pytest.approx(best.x, abs=1e-4)
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(found, rel=1e-4)


def test_logits_that_are_all_equal_have_a_temperature_of_1() -> None:
    assert fit_temperature(np.zeros((5, 3)), np.array([0, 1, 2, 0, 1])) == 1.0


def test_few_images_and_bad_logits_leave_the_temperature_at_1() -> None:
    assert fit_temperature(np.zeros((0, 2)), np.zeros(0, int)) == 1.0
    assert fit_temperature(np.array([[np.nan, 0.0]]), np.array([0])) == 1.0


def test_clipping_bounds_the_loss_and_rows_still_sum_to_1() -> None:
    values = np.exp(log_probabilities(np.array([[50.0, 0.0, -50.0], [0.0, 0.1, 0.2]]), clip=0.01))
    np.testing.assert_allclose(values.sum(axis=1), 1.0)
    np.testing.assert_allclose(values[0], [0.98, 0.01, 0.01])
    np.testing.assert_allclose(values[1], 0.01 + 0.97 * softmax([0.0, 0.1, 0.2]))


def test_clipping_keeps_the_answer_however_many_classes_there_are() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 1000))  # all probabilities are near 0.001
    clipped = log_probabilities(logits, clip=0.0005)
    np.testing.assert_array_equal(clipped.argsort(axis=1), logits.argsort(axis=1))


def test_calibration_error_by_hand() -> None:
    confidence, correct = np.array([0.9, 0.9, 0.7, 0.7]), np.array([True, False, True, True])
    # two bins of two images: |1/2 - 0.9| and |1 - 0.7|
    assert calibration_error(np.log(confidence), correct) == pytest.approx((0.4 + 0.3) / 2)

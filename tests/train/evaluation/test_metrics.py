"""Validation metrics against values by hand and by scikit-learn."""

from functools import partial

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    log_loss,
    roc_auc_score,
    top_k_accuracy_score,
)

from train.evaluation.metrics import (
    Evaluation,
    area_under_roc,
    evaluate_logits,
    f1_of_classes,
    top_accuracy,
)


def example(num_classes: int, n: int = 60, present: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, present or num_classes, n)
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += 1
    return logits, labels


def evaluation(num_classes: int = 2, **options: int) -> Evaluation:
    return evaluate_logits(*example(num_classes, **options), tuple(f"c{i}" for i in range(num_classes)))


def test_values_by_hand() -> None:
    logits = np.log(np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]]))
    result = evaluate_logits(logits, np.array([0, 0, 1, 1]), ("cat", "dog"))
    assert result.values["accuracy"] == 0.5
    assert result.values["log_loss"] == pytest.approx(-np.log([0.9, 0.4, 0.3, 0.8]).mean())
    assert result.values["roc_auc"] == 0.75
    assert result.values["f1_macro"] == 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("num_classes", "n"), [(2, 60), (2, 1500), (5, 60), (5, 1500), (150, 700)])
def test_values_are_scikit_learns(num_classes: int, n: int, dtype: type) -> None:
    logits, labels = example(num_classes, n)
    labels[:num_classes] = np.arange(num_classes)
    logits = logits.astype(dtype)
    values = evaluate_logits(logits, labels, tuple(f"c{i}" for i in range(num_classes))).values
    probabilities = softmax(logits.astype(np.float64), axis=1)
    predicted = probabilities.argmax(axis=1)
    close = partial(pytest.approx, rel=0, abs=1e-9)
    assert values["accuracy"] == accuracy_score(labels, predicted)
    assert values["log_loss"] == close(log_loss(labels, probabilities))
    assert values["f1_macro"] == close(f1_score(labels, predicted, average="macro"))
    auc = roc_auc_score(
        labels, probabilities[:, 1] if num_classes == 2 else probabilities, multi_class="ovr"
    )
    assert values["roc_auc"] == close(auc)


@pytest.mark.parametrize("positives", [1, 30, 800, 999])
@pytest.mark.parametrize("decimals", [0, 1, 9], ids=["most scores equal", "some", "none"])
def test_roc_auc_is_scikit_learns_with_equal_scores(positives: int, decimals: int) -> None:
    rng = np.random.default_rng(positives)
    truth = rng.permutation(np.arange(1000) < positives)
    scores = (rng.random(1000) + 0.2 * truth).round(decimals)
    assert area_under_roc(scores, truth) == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)


@pytest.mark.parametrize("num_classes", [9, 10, 300])
def test_top5_accuracy_is_scikit_learns_from_ten_classes_on(num_classes: int) -> None:
    logits, labels = example(num_classes)
    values = evaluation(num_classes).values
    assert ("top5_accuracy" in values) == (num_classes >= 10)
    expected = top_k_accuracy_score(labels, logits, k=5, labels=np.arange(num_classes))
    assert top_accuracy(logits, labels) == values.get("top5_accuracy", expected) == expected


def test_of_equal_logits_the_first_are_the_likeliest_and_nan_is_never_right() -> None:
    labels = np.arange(12)
    assert top_accuracy(np.zeros((12, 12)), labels) == 5 / 12
    assert top_accuracy(np.zeros((12, 12)), labels, k=1) == 1 / 12
    assert top_accuracy(np.full((12, 12), np.nan), labels) == 0
    own_nan = np.where(np.eye(12, dtype=bool), np.nan, 0.0)
    assert top_accuracy(own_nan, labels) == 0


def test_the_number_of_metrics_does_not_grow_with_the_classes() -> None:
    few, many = (evaluation(num_classes, n=2000).values for num_classes in (2, 40))
    assert few.keys() | {"top5_accuracy"} == many.keys()


def test_a_class_without_validation_images_has_no_auc_and_f1_of_0() -> None:
    assert "roc_auc" not in evaluation(3, present=2).values
    counted, f1 = f1_of_classes(np.array([0, 1]), np.array([2, 1]), 3)
    assert counted.tolist() == [True, True, True]
    assert f1.tolist() == [0, 1, 0]


def test_a_class_that_is_neither_there_nor_predicted_does_not_count() -> None:
    result = evaluate_logits(
        np.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0]]), np.array([0, 1]), ("a", "b", "c")
    )
    assert result.values["f1_macro"] == 1.0  # as scikit-learn's


def test_confident_logits_do_not_overflow() -> None:
    result = evaluate_logits(np.array([[2000.0, -2000.0], [0.0, 0.0]]), np.array([1, 1]), ("a", "b"))
    assert result.values["log_loss"] == pytest.approx((4000 + np.log(2)) / 2)


def test_logits_that_are_not_finite_give_a_result_all_the_same() -> None:
    result = evaluate_logits(np.array([[np.nan, 0.0], [1.0, 0.0]]), np.array([0, 1]), ("a", "b"))
    assert np.isnan(result.values["log_loss"])
    assert "roc_auc" not in result.values


def overconfident(n: int, prior: tuple[float, ...], skill: float, seed: int = 0) -> Evaluation:
    rng = np.random.default_rng(seed)
    num_classes = len(prior)
    labels = np.concatenate([np.arange(num_classes), rng.choice(num_classes, n - num_classes, p=prior)])
    logits = 2.5 * (rng.normal(size=(n, num_classes)) + skill * np.eye(num_classes)[labels])
    return evaluate_logits(logits, labels, tuple(f"c{i}" for i in range(num_classes)), clip=1e-4)


def test_few_images_do_not_make_calibration_look_harmful() -> None:
    """Temperatures fitted on halves of them did."""
    results = [overconfident(20, (0.5, 0.5), 1.5, seed).values for seed in range(30)]
    assert np.mean([r["log_loss_calibrated"] for r in results]) < np.mean([r["log_loss"] for r in results])

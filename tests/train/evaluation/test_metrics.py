"""Validation metrics against values by hand and by scikit-learn, and the table of predictions."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score

from train.data.index import ImageSet
from train.evaluation.metrics import Evaluation, evaluate_logits, read_predictions, write_predictions


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
    assert result.values["f1/cat"] == result.values["f1/dog"] == result.values["f1_macro"] == 0.5
    assert result.confusion.tolist() == [[1, 1], [1, 1]]


def test_the_confusion_matrix_has_a_row_for_each_true_class() -> None:
    logits, labels = example(3)
    result = evaluation(3)
    assert result.confusion.sum(axis=1).tolist() == np.bincount(labels).tolist()
    assert result.confusion.sum(axis=0).tolist() == np.bincount(logits.argmax(1)).tolist()
    assert result.confusion.sum(axis=0).tolist() != result.confusion.sum(axis=1).tolist()


@pytest.mark.parametrize("num_classes", [2, 5])
def test_values_are_scikit_learns(num_classes: int) -> None:
    logits, labels = example(num_classes)
    values = evaluation(num_classes).values
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predicted = probabilities.argmax(axis=1)
    assert values["accuracy"] == accuracy_score(labels, predicted)
    assert values["log_loss"] == pytest.approx(log_loss(labels, probabilities))
    assert values["f1_macro"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    auc = roc_auc_score(
        labels, probabilities[:, 1] if num_classes == 2 else probabilities, multi_class="ovr"
    )
    assert values["roc_auc"] == pytest.approx(auc)


def test_a_class_without_validation_images_has_no_auc_and_f1_of_0() -> None:
    values = evaluation(3, present=2).values
    assert "roc_auc" not in values
    assert values["f1/c2"] == 0.0
    assert evaluation(3, present=2).confusion.shape == (3, 3)


def test_a_class_that_is_neither_there_nor_predicted_has_its_row_and_column() -> None:
    result = evaluate_logits(
        np.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0]]), np.array([0, 1]), ("a", "b", "c")
    )
    assert result.confusion.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert (result.values["f1/b"], result.values["f1/c"]) == (1.0, 0.0)
    assert result.values["f1_macro"] == 1.0  # as scikit-learn's


def test_confident_logits_do_not_overflow() -> None:
    result = evaluate_logits(np.array([[2000.0, -2000.0], [0.0, 0.0]]), np.array([1, 1]), ("a", "b"))
    assert result.values["log_loss"] == pytest.approx((4000 + np.log(2)) / 2)


def test_logits_that_are_not_finite_give_a_result_all_the_same() -> None:
    result = evaluate_logits(np.array([[np.nan, 0.0], [1.0, 0.0]]), np.array([0, 1]), ("a", "b"))
    assert np.isnan(result.values["log_loss"])
    assert "roc_auc" not in result.values


ODD = [
    "a\nb.jpg",
    "c\rd.jpg",
    'quote",comma.jpg',
    "고양이.jpg",
    os.fsdecode(b"\xff\xfe.jpg"),
    " x .jpg",
    "=1+1",
]


def odd_set(class_names: tuple[str, ...] = ("cat", "big, \n고양이")) -> ImageSet:
    labels = np.arange(len(ODD)) % 2
    return ImageSet(Path("nowhere"), ODD, labels, class_names, [""] * len(ODD))


def odd_evaluation(images: ImageSet) -> Evaluation:
    logits = np.random.default_rng(0).normal(scale=20, size=(len(images), 2))
    return evaluate_logits(logits, images.labels, images.class_names)


def test_predictions_survive_the_file_whatever_the_names(tmp_path: Path) -> None:
    images = odd_set()
    before = odd_evaluation(images)
    write_predictions(tmp_path / "p.csv", images, before)
    after = read_predictions(tmp_path / "p.csv", images)
    assert after.labels.tolist() == before.labels.tolist()
    assert after.confusion.tolist() == before.confusion.tolist()
    for name, value in before.values.items():
        assert after.values[name] == pytest.approx(value, rel=1e-6), name
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_each_row_says_label_prediction_loss_and_probabilities(tmp_path: Path, clip: float) -> None:
    images = odd_set()
    result = odd_evaluation(images)
    write_predictions(tmp_path / "p.csv", images, result, clip=clip)
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ODD
    for i, row in enumerate(rows):
        assert row["label"] == images.class_names[images.labels[i]]
        assert row["correct"] == str(int(row["label"] == row["prediction"]))
        probabilities = [float(row[f"probability_{name}"]) for name in images.class_names]
        assert sum(probabilities) == pytest.approx(1)
        assert min(probabilities) >= clip
        assert row["prediction"] == images.class_names[int(np.argmax(probabilities))]
        loss = -np.log(max(probabilities[images.labels[i]], 1e-45))
        assert float(row["loss"]) == pytest.approx(loss, abs=1e-4)


def test_predictions_of_other_images_are_refused(tmp_path: Path) -> None:
    images = odd_set()
    write_predictions(tmp_path / "p.csv", images, odd_evaluation(images))
    with pytest.raises(AssertionError, match=r"p.csv is of other images"):
        read_predictions(tmp_path / "p.csv", images.take(np.arange(3)))


def overconfident(n: int, prior: tuple[float, ...], skill: float, seed: int = 0) -> Evaluation:
    rng = np.random.default_rng(seed)
    num_classes = len(prior)
    labels = np.concatenate([np.arange(num_classes), rng.choice(num_classes, n - num_classes, p=prior)])
    logits = 2.5 * (rng.normal(size=(n, num_classes)) + skill * np.eye(num_classes)[labels])
    return evaluate_logits(logits, labels, tuple(f"c{i}" for i in range(num_classes)), clip=1e-4)


@pytest.mark.parametrize(
    ("n", "prior", "skill"),
    [(20, (0.5, 0.5), 1.0), (200, (0.95, 0.05), 2.0), (40, (0.5, 0.5), 30.0), (5, (0.2,) * 5, 3.0)],
    ids=["few", "imbalanced", "separated", "one of each class"],
)
def test_what_is_reported_as_calibrated_is_what_is_served(
    tmp_path: Path, n: int, prior: tuple[float, ...], skill: float
) -> None:
    result = overconfident(n, prior, skill)
    names = tuple(f"c{i}" for i in range(len(prior)))
    images = ImageSet(Path("nowhere"), [f"{i}.png" for i in range(n)], result.labels, names, [""] * n)
    write_predictions(tmp_path / "p.csv", images, result, result.values["temperature"], clip=1e-4)
    with (tmp_path / "p.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert result.values["log_loss_calibrated"] == pytest.approx(np.mean(losses), abs=1e-6)


def test_few_images_do_not_make_calibration_look_harmful() -> None:
    """Temperatures fitted on halves of them did."""
    results = [overconfident(20, (0.5, 0.5), 1.5, seed).values for seed in range(30)]
    assert np.mean([r["log_loss_calibrated"] for r in results]) < np.mean([r["log_loss"] for r in results])

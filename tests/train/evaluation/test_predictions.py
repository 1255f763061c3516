"""val_predictions.csv is read back as it was written, and its numbers are those that are served."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from train.data.index import ImageSet
from train.evaluation.metrics import Evaluation, evaluate_logits
from train.evaluation.predictions import read_predictions, write_predictions

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
    after = read_predictions(tmp_path / "p.csv")
    assert after.paths == ODD
    assert after.class_names == images.class_names
    assert after.labels.tolist() == before.labels.tolist()
    assert after.label_names == [images.class_names[label] for label in before.labels]
    assert after.predicted.tolist() == before.logits.argmax(axis=1).tolist()
    assert after.accuracy == before.values["accuracy"]
    again = evaluate_logits(np.log(np.maximum(after.probabilities, 1e-45)), after.labels, after.class_names)
    for name, value in before.values.items():
        assert again.values[name] == pytest.approx(value, rel=1e-6), name
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_the_confusion_matrix_has_a_row_for_each_true_class(tmp_path: Path) -> None:
    logits = np.array([[2.0, 1, 0, 0], [2.0, 1, 0, 0], [0, 1, 2.0, 0], [0, 0, 2.0, 0]])
    labels, names = np.array([0, 1, 2, 2]), ("a", "b", "c", "neither there nor predicted")
    images = ImageSet(Path("nowhere"), list("wxyz"), labels, names, [""] * 4)
    write_predictions(tmp_path / "p.csv", images, evaluate_logits(logits, labels, names))
    confusion = read_predictions(tmp_path / "p.csv").confusion
    assert confusion.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]


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

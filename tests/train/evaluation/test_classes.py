"""Tables of classes: nothing of them is lost where a confusion matrix cannot be read."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from train.evaluation.classes import confusions, write_class_tables
from train.evaluation.predictions import Predictions


def predictions(num_classes: int, n: int = 400) -> Predictions:
    """The last class has no image."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes - 1, n)
    predicted = np.where(rng.random(n) < 0.5, labels, rng.integers(0, num_classes, n))
    names = tuple(f'class "{i}", odd\n' for i in range(num_classes))
    empty = np.zeros((n, 0))
    return Predictions("p.csv", [str(i) for i in range(n)], labels, predicted, np.zeros(n), empty, names)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("num_classes", [40, 41])
def test_pairs_are_written_where_the_matrix_is_not_drawn(tmp_path: Path, num_classes: int) -> None:
    found = predictions(num_classes)
    lines = write_class_tables(tmp_path, found)
    assert (tmp_path / "confusion_pairs.csv").exists() == bool(lines) == (num_classes > 40)
    if lines:
        matrix = confusion_matrix(found.labels, found.predicted, labels=np.arange(num_classes))
        index = {name: i for i, name in enumerate(found.class_names)}
        rows = read(tmp_path / "confusion_pairs.csv")
        counts = [int(row["images"]) for row in rows]
        assert counts == sorted(counts, reverse=True)
        assert sum(counts) == matrix.sum() - np.trace(matrix)
        for row in rows:
            label, guess = index[row["label"]], index[row["prediction"]]
            assert int(row["images"]) == matrix[label, guess]
            assert float(row["share"]) == pytest.approx(matrix[label, guess] / matrix[label].sum())


def test_the_classes_are_sorted_by_the_worst_with_scikit_learns_values(tmp_path: Path) -> None:
    found = predictions(50)
    write_class_tables(tmp_path, found)
    rows = read(tmp_path / "per_class.csv")
    precision, recall, f1, images = precision_recall_fscore_support(
        found.labels, found.predicted, labels=np.arange(50), zero_division=0.0
    )
    index = {name: i for i, name in enumerate(found.class_names)}
    assert [float(row["f1"]) for row in rows] == sorted(f1)
    assert len(rows) == 50
    for row in rows:
        i = index[row["class"]]
        assert int(row["images"]) == images[i]
        assert float(row["f1"]) == pytest.approx(f1[i])
        assert float(row["precision"] or 0) == pytest.approx(precision[i])
        assert float(row["recall"] or 0) == pytest.approx(recall[i])
    assert [row["recall"] for row in rows if row["images"] == "0"] == [""]


def test_without_a_mistake_the_pairs_have_a_header_alone(tmp_path: Path) -> None:
    found = predictions(50)
    right = replace(found, predicted=found.labels)
    assert confusions(right) == []
    write_class_tables(tmp_path, right)
    assert (tmp_path / "confusion_pairs.csv").read_text() == '"label","prediction","images","share"\n'


def test_ten_thousand_classes_need_no_matrix(tmp_path: Path) -> None:
    write_class_tables(tmp_path, predictions(10_000, 50_000))
    assert len(read(tmp_path / "per_class.csv")) == 10_000

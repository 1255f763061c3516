"""val_predictions.csv is read back as it was written, and its numbers are those that are served."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from serve.contract.errors import UserError
from train.data.index import ImageSet
from train.evaluation.metrics import Evaluation, evaluate_logits
from train.evaluation.predictions import (
    COLUMNS,
    TABLE,
    StoredAnswers,
    arrays_of,
    finish_predictions,
    is_short,
    predictions_at_a_stop,
    read_labels,
    read_predictions,
    write_predictions,
)

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


def run_folder(
    tmp_path: Path, num_classes: int = 2, n: int = len(ODD)
) -> tuple[Path, ImageSet, Evaluation]:
    """The folder of a run that was killed after its best epoch, and what its table must hold."""
    names = tuple(f"c{i}" for i in range(num_classes))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, n)
    paths = [*ODD, *(f"{i}.png" for i in range(n - len(ODD)))]
    images = ImageSet(Path("nowhere"), paths, labels, names, [""] * n)
    logits = rng.normal(scale=3, size=(n, num_classes)).astype(np.float32)
    evaluation = evaluate_logits(logits, labels, names)
    StoredAnswers.of(images, evaluation, 1.5, 1e-4).save(tmp_path / "val_predictions.npz")
    return tmp_path / TABLE, images, evaluation


def test_a_run_that_was_killed_is_read_from_its_arrays_and_finished_to_the_same_table(
    tmp_path: Path,
) -> None:
    table, images, evaluation = run_folder(tmp_path)
    killed, labels = read_predictions(table), read_labels(table)
    assert killed.paths == labels[0] == ODD
    assert labels[1] == killed.label_names
    finish_predictions(table)
    assert [path.name for path in tmp_path.iterdir()] == [TABLE], "the table has all that the arrays had"
    write_predictions(tmp_path / "unbroken.csv", images, evaluation, 1.5, 1e-4)
    assert table.read_bytes() == (tmp_path / "unbroken.csv").read_bytes()
    finished = read_predictions(table)
    assert read_labels(table) == labels
    assert finished.predicted.tolist() == killed.predicted.tolist()
    np.testing.assert_allclose(finished.probabilities, killed.probabilities, rtol=1e-7)
    np.testing.assert_allclose(finished.losses, killed.losses, atol=1e-6)
    finish_predictions(table)
    assert read_predictions(table).accuracy == finished.accuracy


def test_a_better_epoch_replaces_the_table_of_an_earlier_stop(tmp_path: Path) -> None:
    table, images, evaluation = run_folder(tmp_path)
    table.write_text("of an earlier epoch")
    assert len(read_predictions(table).paths) == len(ODD), "the arrays come first"
    StoredAnswers.of(images, evaluation, 1.0, 0.0).save(arrays_of(table))
    assert not table.exists()


@pytest.mark.parametrize("code", [0, 1])
def test_the_table_is_written_also_when_a_run_is_stopped(tmp_path: Path, code: int) -> None:
    table, *_ = run_folder(tmp_path)
    with pytest.raises(SystemExit), predictions_at_a_stop(table, enabled=code == 0):
        raise SystemExit
    assert table.exists() == (code == 0)


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_damaged_arrays_are_an_error_that_names_them(tmp_path: Path, kept: int) -> None:
    table, *_ = run_folder(tmp_path)
    arrays = arrays_of(table)
    arrays.write_bytes(arrays.read_bytes()[:kept])
    for read in (read_predictions, read_labels, finish_predictions):
        with pytest.raises(UserError, match=r"val_predictions\.npz"):
            read(table)


def test_with_many_classes_the_table_has_the_label_and_the_likeliest_five(tmp_path: Path) -> None:
    table, images, _ = run_folder(tmp_path, num_classes=101, n=40)
    finish_predictions(table)
    answers = read_predictions(table)
    with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:8] == [*COLUMNS, "label_probability", "top_1", "top_probability_1"]
    assert len(rows[0]) == 5 + 1 + 2 * 5
    for i, row in enumerate(rows):
        label = images.class_names[images.labels[i]]
        best = np.argsort(-answers.probabilities[i], kind="stable")[:5]
        assert (row["path"], row["label"], row["prediction"]) == (images.paths[i], label, row["top_1"])
        assert [row[f"top_{k}"] for k in range(1, 6)] == [f"c{k}" for k in best]
        shown = [float(row[f"top_probability_{k}"]) for k in range(1, 6)]
        assert shown == pytest.approx(answers.probabilities[i, best], rel=1e-6)
        own = answers.probabilities[i, images.labels[i]]
        assert float(row["label_probability"]) == pytest.approx(own, rel=1e-6)
    assert is_short(table)
    assert read_labels(table)[1] == [row["label"] for row in rows]
    arrays_of(table).unlink()
    with pytest.raises(UserError, match=r"val_predictions\.npz"):
        read_predictions(table)


def test_all_probabilities_are_in_the_table_up_to_a_hundred_classes(tmp_path: Path) -> None:
    table, *_ = run_folder(tmp_path, num_classes=100)
    finish_predictions(table)
    assert not is_short(table)
    assert read_predictions(table).probabilities.shape == (len(ODD), 100)

"""val_predictions.csv is read back as it was written, and its numbers are those that are served."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from serve.contract.errors import UserError
from train.evaluation.metrics import Evaluation, evaluate_logits
from train.evaluation.predictions import (
    ARRAYS,
    COLUMNS,
    TABLE,
    StoredAnswers,
    finish_predictions,
    predictions_at_a_stop,
    read_labels,
    read_predictions,
    write_answers,
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


def odd_answers(clip: float = 0.0) -> StoredAnswers:
    labels = np.arange(len(ODD)) % 2
    logits = np.random.default_rng(0).normal(scale=20, size=(len(ODD), 2))
    return StoredAnswers(ODD, labels, ("cat", "big, \n고양이"), logits, clip=clip)


def test_predictions_survive_the_file_whatever_the_names(tmp_path: Path) -> None:
    before = odd_answers()
    before.save(tmp_path)
    after = read_predictions(tmp_path)
    assert after.paths == ODD
    assert after.class_names == before.class_names
    assert after.labels.tolist() == before.labels.tolist()
    assert after.predicted.tolist() == before.logits.argmax(axis=1).tolist()
    values = evaluate_logits(before.logits, before.labels, before.class_names).values
    assert after.accuracy == values["accuracy"]
    again = evaluate_logits(np.log(np.maximum(after.probabilities, 1e-45)), after.labels, after.class_names)
    for name, value in values.items():
        assert again.values[name] == pytest.approx(value, rel=1e-6), name
    assert [path.name for path in tmp_path.iterdir()] == [ARRAYS]


def test_the_confusion_matrix_has_a_row_for_each_true_class() -> None:
    logits = np.array([[2.0, 1, 0, 0], [2.0, 1, 0, 0], [0, 1, 2.0, 0], [0, 0, 2.0, 0]])
    labels, names = np.array([0, 1, 2, 2]), ("a", "b", "c", "neither there nor predicted")
    confusion = StoredAnswers(list("wxyz"), labels, names, logits).predictions("").confusion
    assert confusion.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_each_row_says_label_prediction_loss_and_probabilities(tmp_path: Path, clip: float) -> None:
    answers = odd_answers(clip)
    write_answers(tmp_path / "p.csv", answers)
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ODD
    for i, row in enumerate(rows):
        assert row["label"] == answers.class_names[answers.labels[i]]
        assert row["correct"] == str(int(row["label"] == row["prediction"]))
        probabilities = [float(row[f"probability_{name}"]) for name in answers.class_names]
        assert sum(probabilities) == pytest.approx(1)
        assert min(probabilities) >= clip
        assert row["prediction"] == answers.class_names[int(np.argmax(probabilities))]
        loss = -np.log(max(probabilities[answers.labels[i]], 1e-45))
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
    names, paths = tuple(f"c{i}" for i in range(len(prior))), [f"{i}.png" for i in range(n)]
    temperature = result.values["temperature"]
    write_answers(
        tmp_path / "p.csv", StoredAnswers(paths, result.labels, names, result.logits, temperature, 1e-4)
    )
    with (tmp_path / "p.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert result.values["log_loss_calibrated"] == pytest.approx(np.mean(losses), abs=1e-6)


def killed_run(folder: Path, num_classes: int = 2, n: int = len(ODD)) -> StoredAnswers:
    """Write what a run leaves that was killed after its best epoch."""
    names = tuple(f"c{i}" for i in range(num_classes))
    rng = np.random.default_rng(0)
    paths = [*ODD, *(f"{i}.png" for i in range(n - len(ODD)))]
    logits = rng.normal(scale=3, size=(n, num_classes)).astype(np.float32)
    answers = StoredAnswers(paths, rng.integers(0, num_classes, n), names, logits, 1.5, 1e-4)
    answers.save(folder)
    return answers


def test_a_run_that_was_killed_is_read_from_its_arrays_and_finished_to_the_same_table(
    tmp_path: Path,
) -> None:
    answers = killed_run(tmp_path)
    killed, labels = read_predictions(tmp_path), read_labels(tmp_path)
    assert killed.paths == labels[0] == ODD
    assert labels[1] == [killed.class_names[label] for label in killed.labels]
    finish_predictions(tmp_path)
    write_answers(tmp_path / "unbroken.csv", answers)
    assert (tmp_path / TABLE).read_bytes() == (tmp_path / "unbroken.csv").read_bytes()


def test_a_better_epoch_replaces_the_table_of_an_earlier_stop(tmp_path: Path) -> None:
    answers = killed_run(tmp_path)
    (tmp_path / TABLE).write_text("of an earlier epoch")
    answers.save(tmp_path)
    assert not (tmp_path / TABLE).exists()


@pytest.mark.parametrize("code", [0, 1])
def test_the_table_is_written_also_when_a_run_is_stopped(tmp_path: Path, code: int) -> None:
    killed_run(tmp_path)
    with pytest.raises(SystemExit), predictions_at_a_stop(tmp_path, enabled=code == 0):
        raise SystemExit
    assert (tmp_path / TABLE).exists() == (code == 0)


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_damaged_arrays_are_an_error_that_names_them(tmp_path: Path, kept: int) -> None:
    killed_run(tmp_path)
    (tmp_path / ARRAYS).write_bytes((tmp_path / ARRAYS).read_bytes()[:kept])
    for read in (read_predictions, read_labels, finish_predictions):
        with pytest.raises(UserError, match=r"val_predictions\.npz"):
            read(tmp_path)


@pytest.mark.parametrize("num_classes", [100, 101])
def test_with_many_classes_the_table_has_the_label_and_the_likeliest_five(
    tmp_path: Path, num_classes: int
) -> None:
    stored = killed_run(tmp_path, num_classes, n=40)
    finish_predictions(tmp_path)
    answers = read_predictions(tmp_path)
    with (tmp_path / TABLE).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    if num_classes == 100:
        assert len(rows[0]) == len(COLUMNS) + 100
        return
    assert list(rows[0])[:8] == [*COLUMNS, "label_probability", "top_1", "top_probability_1"]
    assert len(rows[0]) == 5 + 1 + 2 * 5
    for i, row in enumerate(rows):
        best = np.argsort(-answers.probabilities[i], kind="stable")[:5]
        assert (row["path"], row["label"]) == (stored.paths[i], f"c{stored.labels[i]}")
        assert row["prediction"] == row["top_1"]
        assert [row[f"top_{k}"] for k in range(1, 6)] == [f"c{k}" for k in best]
        shown = [float(row[f"top_probability_{k}"]) for k in range(1, 6)]
        assert shown == pytest.approx(answers.probabilities[i, best], rel=1e-6)
        own = answers.probabilities[i, stored.labels[i]]
        assert float(row["label_probability"]) == pytest.approx(own, rel=1e-6)

"""Runs are read back as they were written, and a file that is not whole is named."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import make_run

from train.evaluation.charts import comparison_curves
from train.evaluation.predictions import StoredAnswers
from train.runs.results import check_metrics, paired, read_run


def test_a_run_is_read_back(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", seed=0, n=30))
    assert run.name == "a"
    assert run.config.lr == 1e-3
    assert run.best_epoch == 2
    assert run.best["val/accuracy"] == run.predictions.accuracy
    assert run.predictions.paths[:2] == ["0.png", "1.png"]
    assert run.predictions.class_names == ("class0", "class1")
    assert run.predictions.probabilities.sum(axis=1) == pytest.approx(np.ones(30))
    own = -np.log(
        [p[label] for p, label in zip(run.predictions.probabilities, run.predictions.labels, strict=True)]
    )
    assert run.predictions.losses == pytest.approx(own, abs=2e-6)


@pytest.mark.parametrize(
    "settings", [{"calibrate": False}, {"clip_probabilities": 0.05}, {"best_by": "log_loss"}]
)
def test_calibration_and_clipping_are_not_taken_for_another_checkpoint(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    run = read_run(make_run(tmp_path / "a", n=200, skill=4.0, **settings))
    assert run.best_epoch == 2
    recorded, served = run.best["val/log_loss"], float(run.predictions.losses.mean())
    assert (served == pytest.approx(recorded, abs=1e-5)) == (settings == {"calibrate": False})


def test_the_best_epoch_is_that_of_the_runs_own_measure(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", best_by="log_loss")
    first, *others = (folder / "metrics.jsonl").read_text().splitlines()
    lines = [json.dumps({**json.loads(first), "val/accuracy": 1.0}), *others]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_run(folder).best_epoch == 2


def test_an_epoch_without_a_validation_is_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[0] = json.dumps({"epoch": 1, "time": 0.0, "train/loss": 1.0})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(folder)
    assert "val/accuracy" not in run.rows[0]
    assert run.best["val/accuracy"] == run.predictions.accuracy
    (legend,) = comparison_curves({"_a": run.rows}, [run.best_epoch]).legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_a"], "matplotlib hides it"


def test_a_last_line_that_was_cut_off_is_not_there_yet(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "ti')
    assert len(read_run(folder).rows) == 3


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def drop(folder: Path, name: str) -> None:
    (folder / name).unlink()


@pytest.mark.parametrize("name", ["val_predictions.npz", "metrics.jsonl", "config.yaml"])
def test_a_file_that_is_missing_empty_or_binary_is_named(tmp_path: Path, name: str) -> None:
    for i, content in enumerate([None, b"", bytes(range(256)) * 9]):
        file = make_run(tmp_path / f"a{i}") / name
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_run(file.parent)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("metrics.jsonl", '{"epoch": 2', '{"epoch": 7', "epoch 2"),
        ("metrics.jsonl", '{"epoch": 2', '{"epoch" 2', "epoch 2"),
        ("metrics.jsonl", '"val/temperature"', '"val/heat"', "val/temperature"),
        ("metrics.jsonl", '"val/log_loss"', '"val/log"', "val/log_loss"),
        ("metrics.jsonl", '{"epoch": 1', '["epoch", 1', "epoch 1"),
        ("config.yaml", 'best_by: "accuracy"', 'best_by: "luck"', "luck"),
        ("config.yaml", "lr: ", "lr: [", "line"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(
    tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    folder = make_run(tmp_path / "a")
    edit(folder / name, old, new)
    with pytest.raises(ValueError, match=name) as raised:
        read_run(folder)
    assert message in str(raised.value)


def test_predictions_of_another_checkpoint_than_the_metrics_are_found(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    answers = StoredAnswers.load(folder)
    replace(answers, logits=answers.logits * 1.01).save(folder)
    with pytest.raises(ValueError, match=r"val_predictions\.npz.*val/log_loss"):
        read_run(folder)


def test_fewer_predictions_are_not_those_of_the_metrics(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", n=40)
    one = StoredAnswers.load(folder)
    replace(one, paths=one.paths[:20], labels=one.labels[:20], logits=one.logits[:20]).save(folder)
    with pytest.raises(ValueError, match=r"val_predictions\.npz.*val/accuracy"):
        read_run(folder)


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'.*none'"):
        read_run(tmp_path / "none")


def test_metrics_that_are_not_numbers_match_themselves(tmp_path: Path) -> None:
    answers = StoredAnswers.load(make_run(tmp_path / "a"))
    accuracy = answers.predictions("a").accuracy
    wrong = int(np.flatnonzero(answers.logits.argmax(axis=1) != answers.labels)[0])
    answers.logits[wrong, answers.labels[wrong] - 1] = math.nan  # argmax takes it, as before
    check_metrics(answers, "a", {"val/accuracy": accuracy, "val/log_loss": math.nan}, "b")


def test_runs_are_paired_by_path_whatever_the_order(tmp_path: Path) -> None:
    one = read_run(make_run(tmp_path / "a", seed=1, n=40)).predictions
    answers = StoredAnswers.load(make_run(tmp_path / "b", seed=2, n=40))
    other = answers.predictions("b")
    expected = paired(other, one)
    turned = replace(
        answers, paths=answers.paths[::-1], labels=answers.labels[::-1], logits=answers.logits[::-1]
    )
    again = paired(turned.predictions("b"), one)
    assert expected is not None
    assert again is not None
    assert again[:5] == expected[:5]
    assert again.log_loss == pytest.approx(expected.log_loss)
    right = dict(zip(one.paths, one.correct, strict=True))
    gained = sum(c and not right[p] for p, c in zip(other.paths, other.correct, strict=True))
    assert expected.gained == gained > 0


def test_runs_are_paired_on_what_they_share(tmp_path: Path) -> None:
    one = read_run(make_run(tmp_path / "a", n=40)).predictions
    other = read_run(make_run(tmp_path / "b", seed=1, n=40, first=30)).predictions
    test = paired(one, other)
    assert test is not None
    assert test.num_images == 10
    assert paired(one, read_run(make_run(tmp_path / "c", first=40)).predictions) is None


def test_one_path_with_two_labels_is_not_the_same_image(tmp_path: Path) -> None:
    one = read_run(make_run(tmp_path / "a")).predictions
    other = read_run(make_run(tmp_path / "b", first=1, names=("class1", "class0"))).predictions
    with pytest.raises(ValueError, match=r"'1\.png'.*'class1'.*'class0'"):
        paired(one, other)


def test_rows_hold_every_metric(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    written = json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])
    assert read_run(folder).best == written

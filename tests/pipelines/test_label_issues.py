"""Wrong labels are found among predictions, and by the whole command with real runs."""

import csv
import json
import re
import subprocess
from pathlib import Path

import forked
import numpy as np
import pytest
from conftest import code_of
from mlflow_store import runs
from PIL import Image
from train_data import draw, flat_set

from pipelines.folds import OutOfFold, train_folds
from pipelines.label_issues import find_issues, main, report
from train.tracking.run_record import RUN_TAGS, Record


def predictions(
    num_classes: int, per_class: int, wrong: float, root: Path = Path(), seed: int = 0
) -> tuple[OutOfFold, np.ndarray]:  # type: ignore[type-arg]
    """Return a good classifier's predictions of images, and which of their labels are wrong."""
    rng = np.random.default_rng(seed)
    true = np.repeat(np.arange(num_classes), per_class)
    logits = rng.normal(size=(len(true), num_classes)) + 5 * np.eye(num_classes)[true]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    flipped = rng.random(len(true)) < wrong
    given = np.where(flipped, (true + rng.integers(1, num_classes, len(true))) % num_classes, true)
    names = tuple(f"class{i}" for i in range(num_classes))
    paths = [f"{i}.png" for i in range(len(true))]
    folds = 1 + np.arange(len(true)) % 3
    return OutOfFold(root, paths, given, probabilities, folds, names, 3), flipped


@pytest.mark.parametrize(("num_classes", "per_class"), [(2, 1000), (10, 200)])
def test_flipped_labels_are_found_and_little_else(num_classes: int, per_class: int) -> None:
    data, flipped = predictions(num_classes, per_class, 0.05)
    issues = find_issues(data)
    hits = flipped[issues.found].sum()
    assert hits / len(issues.found) > 0.9
    assert hits / flipped.sum() > 0.9
    assert 0.8 < issues.estimate / flipped.sum() < 1.2
    assert (np.diff(issues.scores[issues.found]) >= 0).all()
    assert flipped[issues.found[: flipped.sum() // 2]].all(), "the least plausible come first"


def test_good_labels_are_left_alone() -> None:
    data, _ = predictions(3, 300, 0.0)
    assert len(find_issues(data).found) < 5


def test_a_class_that_no_fold_validates_is_no_obstacle() -> None:
    data, flipped = predictions(4, 100, 0.05)
    keep = data.labels != 3
    data = OutOfFold(
        data.root,
        [path for path, k in zip(data.paths, keep, strict=True) if k],
        data.labels[keep],
        data.probabilities[keep],
        data.folds[keep],
        data.class_names,
        3,
    )
    found = find_issues(data).found
    assert flipped[keep][found].mean() > 0.6


def test_models_that_know_nothing_list_nothing(tmp_path: Path) -> None:
    data, _ = predictions(2, 100, 0.5, tmp_path)
    with pytest.raises(ValueError, match="--weights"):
        report(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_of_one_class_are_an_error() -> None:
    data, _ = predictions(2, 10, 0.0)
    one = OutOfFold(
        data.root,
        data.paths[:5],
        data.labels[:5],
        data.probabilities[:5],
        data.folds[:5],
        data.class_names,
        3,
    )
    with pytest.raises(ValueError, match="one class"):
        find_issues(one)


def test_the_report_is_a_table_a_picture_and_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, _ = predictions(2, 100, 0.1, tmp_path)
    for path in data.paths:
        draw(tmp_path / path)
    missing = OutOfFold(
        data.root,
        data.paths,
        data.labels,
        data.probabilities,
        2 * (data.folds // 2) + 1,
        data.class_names,
        3,
    )
    issues = report(missing, tmp_path / "out")
    with (tmp_path / "out" / "label_issues.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [data.paths[i] for i in issues.found]
    assert [int(row["rank"]) for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        assert {row["label"], row["suggestion"]} == {"class0", "class1"}
        total = float(row["probability_of_label"]) + float(row["probability_of_suggestion"])
        assert total == pytest.approx(1, abs=1e-4)
    with Image.open(tmp_path / "out" / "label_issues.png") as image:
        assert image.width > 1000
    printed = capsys.readouterr().out
    assert re.search(r"\b200\b.*\b2 of 3\b", printed)
    assert re.search(r"warning:.*\bfold 2\b", printed)
    assert f"listed: {len(issues.found)}" in printed


def test_an_edited_list_is_not_replaced(tmp_path: Path) -> None:
    data, _ = predictions(2, 100, 0.1, tmp_path)
    for path in data.paths:
        draw(tmp_path / path)
    table = tmp_path / "out" / "label_issues.csv"
    report(data, tmp_path / "out")
    whole = table.read_text()
    report(data, tmp_path / "out")
    edited = "".join(whole.splitlines(keepends=True)[:-1])  # the last one was right after all
    table.write_text(edited)
    with pytest.raises(ValueError, match="--overwrite"):
        report(data, tmp_path / "out")
    assert table.read_text() == edited
    assert sorted(path.name for path in table.parent.iterdir()) == [table.name, "label_issues.png"]
    report(data, tmp_path / "out", overwrite=True)
    assert table.read_text() == whole


@pytest.mark.parametrize("name", ["label_issues.csv", "label_issues.png"])
def test_a_file_of_the_users_is_found_before_any_training(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("path,label\n")
    assert main(["--folds", "2", "--output", str(tmp_path), "--", "--data", "nowhere"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "path,label\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--folds"),
        (["a", "--folds", "3"], "--folds"),
        (["a", "--", "--epochs", "3"], "--folds"),
        (["--folds", "1", "--", "--epochs", "3"], "--folds 1"),
        (["--folds", "-1", "--", "--epochs", "3"], "--folds -1"),
        (["--folds", "3", "--nproc_per_node", "0"], "--nproc_per_node 0"),
        (["--folds", "3", "--", "--name", "x"], "--name"),
        (
            ["--folds", "3", "--", "--data", "nowhere", "--stop-after", "1"],
            "--stop-after",
        ),
        (["--folds", "3", "--", "--data", "nowhere", "--val-data", "x"], "--val-data"),
        (["--folds", "3", "--", "--epoch", "3"], "--epoch"),
        (["nowhere"], "nowhere/checkpoints/best.pt"),
    ],
)
def test_unusable_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(main, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_all_folds_with_one_command_and_again_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Real runs on reddish cats and bluish dogs, of which four have the other's name."""

    refused = False

    def call(program: str, *arguments: object, processes: int, environment: object) -> None:
        assert (processes, environment) == (1, None)  # with --track false
        print(forked.run(program, *arguments, cwd=tmp_path, code=2 if refused else 0))
        if refused:
            raise subprocess.CalledProcessError(2, [program])

    monkeypatch.setattr("pipelines.folds.run_program", call)
    wrong = {"dog.103.png", "dog.117.png", "cat.103.png", "cat.117.png"}
    root = flat_set(tmp_path / "images", per_class=40)
    for i in (3, 17):
        (root / f"cat.{i}.png").rename(root / f"dog.{i + 100}.png")
        (root / f"dog.{i}.png").rename(root / f"cat.{i + 100}.png")
    out = tmp_path / "out"
    command = ["--folds", "2", "--output", str(out), "--", "--data", str(root), "--model", "simple_cnn"]
    command += ["--image-size", "16", "--epochs", "12", "--batch-size", "8", "--ema", "0"]
    command += ["--optimizer", "adamw", "--lr", "3e-3"]
    command += ["--color-jitter", "0", "--random-erasing", "0", "--num-workers", "0", "--track", "false"]
    command += ["--precision", "fp32", "--channels-last", "false", "--deterministic"]
    assert main(command) == 0
    assert "80 images in 2 of 2 folds" in capfd.readouterr().out
    with (out / "label_issues.csv").open(newline="") as file:
        found = {row["path"] for row in csv.DictReader(file)}
    assert found <= wrong
    assert len(found) >= 2

    assert main(command) == 0
    printed = capfd.readouterr().out
    assert "80 images in 2 of 2 folds" in printed
    assert "epoch 1/12" not in printed, "nothing is trained"
    refused = True
    assert main([*command, "--lr", "0.1"]) == 2
    assert "lr 0.003 -> 0.1" in capfd.readouterr().out
    (root / "dog.103.png").rename(root / "cat.3.png")  # one label is corrected
    assert main(command) == 2
    assert "digest" in capfd.readouterr().out


def test_a_fold_with_an_epoch_done_is_resumed_and_others_are_found_by_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """The exit code of a training that fails is that of the whole. In MLflow all are below one run."""
    for fold, file in ((1, "last.pt"), (2, "epoch-000000-step-00000003.pt")):
        checkpoint = tmp_path / f"fold{fold}of3" / "checkpoints" / file
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
    started: list[tuple[str, ...]] = []

    parents: list[str] = []

    def call(*command: str, processes: int, environment: dict[str, str]) -> None:
        assert processes == 2
        parents.append(json.loads(environment[RUN_TAGS])["mlflow.parentRunId"])
        started.append(command[-2:])
        if len(started) == 3:
            raise subprocess.CalledProcessError(143, command)

    monkeypatch.setattr("pipelines.folds.run_program", call)
    command = ["--folds", "3", "--nproc_per_node", "2", "--output", str(tmp_path), "--", "--epochs", "3"]
    assert main(command) == 143
    resumed = ("--resume", str(tmp_path / "fold1of3"))
    assert started == [resumed, ("--name", "fold2of3"), ("--name", "fold3of3")]
    (parent,) = runs(store)
    assert parents == [parent.info.run_id] * 3
    assert (parent.info.run_name, parent.info.status) == (tmp_path.name, "FAILED")
    assert parent.data.tags["purebred.kind"] == "cross-validation"


def test_folds_keep_their_run_in_mlflow_which_has_the_accuracy_of_all_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    data, _ = predictions(2, 100, 0.1, tmp_path)

    def call(*command: str, processes: int, environment: dict[str, str]) -> None:
        record = Record("fold", "purebred", tags=json.loads(environment[RUN_TAGS]))
        folder = tmp_path / command[-1]
        folder.mkdir(exist_ok=True)
        record.save(folder / "tracking.json")

    monkeypatch.setattr("pipelines.folds.run_program", call)
    monkeypatch.setattr("pipelines.folds.read_folds", lambda _: data)
    for _ in range(2):
        assert train_folds(2, tmp_path, [], 1) is data
    (parent,) = runs(store)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"best/val/accuracy": data.accuracy}

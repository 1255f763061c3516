"""Wrong labels are found among predictions, and by the whole command with real runs."""

import csv
import subprocess
from functools import partial
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image
from train_data import draw, flat_set, linear_model, make_data, make_trainee

from pipelines.label_issues import _content_digest, _finished, find_issues, main, report, train_folds
from pipelines.out_of_fold import OutOfFold
from train.checkpoint import save_checkpoint
from train.cli import parse_config
from train.data.index import prepare_data
from train.engine.prepare import resolve_defaults
from train.engine.state import checkpoint_state
from train.runs.history import History


def predictions(
    num_classes: int, per_class: int, wrong: float, root: Path = Path(), seed: int = 0
) -> tuple[OutOfFold, np.ndarray]:  # type: ignore[type-arg]
    """A good classifier's, of images of which a share has another class's label; and which those are."""
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
    with pytest.raises(ValueError, match="surely better"):
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
    with pytest.raises(ValueError, match="images of one class only"):
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
    assert "200 images in 2 of 3 folds" in printed
    assert "warning: no run of fold 2: its images are not judged" in printed
    assert f"likely ones listed: {len(issues.found)}" in printed


def test_a_list_that_somebody_edited_is_not_replaced(tmp_path: Path) -> None:
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
        ([], "give either the run directories of the folds, or --folds"),
        (["a", "--folds", "3"], "give either"),
        (["a", "--", "--epochs", "3"], "only --folds starts"),
        (["--folds", "1", "--", "--epochs", "3"], "--folds 1 would validate on everything"),
        (["--folds", "-1", "--", "--epochs", "3"], "--folds -1 is less than 0"),
        (["--folds", "3", "--nproc_per_node", "0"], "--nproc_per_node 0 is less than 1"),
        (["--folds", "3", "--", "--name", "x"], "--name is set for each fold"),
        (
            ["--folds", "3", "--", "--data", "nowhere", "--stop-after", "1"],
            "--stop_after is set for each fold",
        ),
        (["--folds", "3", "--", "--data", "nowhere", "--val-data", "x"], "--val_data is set for each fold"),
        (["--folds", "3", "--", "--epoch", "3"], "--epoch"),
        (["nowhere"], "nowhere/checkpoints/best.pt cannot be read"),
    ],
)
def test_unusable_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_all_folds_with_one_command_and_again_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Real runs on reddish cats and bluish dogs, of which four have the other's name."""

    def call(program: str, *arguments: object, processes: int) -> None:
        assert processes == 1
        print(forked.run(program, *arguments, cwd=tmp_path))

    monkeypatch.setattr("pipelines.label_issues.run_program", call)
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
    assert printed.count("is finished") == 2
    assert "epoch 1/12" not in printed
    assert main([*command, "--lr", "0.1"]) == 2
    assert "fold1of2 was trained with other settings: --lr 0.003 -> 0.1; choose" in capfd.readouterr().err
    (root / "dog.103.png").rename(root / "cat.3.png")  # one label is corrected
    assert main(command) == 2
    assert f"fold1of2 was trained before {root} changed" in capfd.readouterr().err


def test_a_fold_that_was_stopped_in_its_first_epoch_goes_on_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has snapshots, but no last.pt yet: train/main.py finds them by itself."""
    checkpoints = tmp_path / "fold1of2" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "epoch-000000-step-00000003.pt").write_bytes(b"")
    started: list[tuple[str, ...]] = []

    def call(*command: str, processes: int) -> None:
        started.append(command)

    monkeypatch.setattr("pipelines.label_issues.run_program", call)
    train_folds(2, tmp_path, ["--data", str(tmp_path)], 1)
    assert [list(command[-2:]) for command in started] == [["--name", f"fold{i}of2"] for i in (1, 2)]


def test_an_interrupted_fold_goes_on_and_a_finished_one_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where images are left out or cannot be read. The exit code of a training is that of all."""
    root, exclude = flat_set(tmp_path / "images"), tmp_path / "issues.csv"
    (root / "cat.99.png").write_bytes(b"not an image")
    exclude.write_text("path\ncat.1.png\n")
    flags = ["--data", str(root), "--exclude", str(exclude), "--max-bad", "0.5", "--epochs", "3"]
    runs = [tmp_path / f"fold{fold}of2" for fold in (1, 2)]
    for fold, (run, epochs_done) in enumerate(zip(runs, (3, 1), strict=True), 1):
        own = ["--folds", "2", "--fold", str(fold), "--output", str(tmp_path), "--name", run.name]
        config, _ = resolve_defaults(parse_config([*flags, *own]))
        history, trainee = (
            History(epochs_done, 1, {"val/accuracy": 1.0}),
            make_trainee(config, linear_model()),
        )
        state = checkpoint_state(trainee, history, prepare_data(config), config, "run")
        save_checkpoint(state, run / "checkpoints" / "last.pt")
    started: list[tuple[str, ...]] = []

    def killed(*command: str, processes: int) -> None:
        assert processes == 2
        started.append(command)
        raise subprocess.CalledProcessError(143, command)

    monkeypatch.setattr("pipelines.label_issues.run_program", killed)
    asked = ["--folds", "2", "--nproc_per_node", "2", "--output", str(tmp_path), "--", *flags]
    assert main(asked) == 143
    assert capsys.readouterr().out.count("is finished") == 1
    (command,) = started
    assert command[-2:] == ("--resume", str(runs[1]))


def test_a_finished_fold_of_remote_data_is_finished(tmp_path: Path) -> None:
    """Its settings name the copy that it trained on."""
    config, data = make_data(tmp_path, folds=2, fold=1, epochs=1)
    run = tmp_path / "out" / "fold1of2"
    history = History(1, 1, {"val/accuracy": 1.0})
    copied = config.replace(data="out/.cache/data-0123")
    state = checkpoint_state(make_trainee(config, linear_model()), history, data, copied, "run")
    save_checkpoint(state, run / "checkpoints" / "last.pt")
    remote = config.replace(data=f"file://{config.data}")
    digest = partial(_content_digest, output=tmp_path / "out")
    assert _finished(run, remote, digest)
    (run / "checkpoints" / "epoch-000009-step-00000000.pt").write_bytes(b"damaged")
    assert _finished(run, remote, digest)
    draw(Path(config.data) / "cat.99.png", 0, 99)
    with pytest.raises(ValueError, match=r"fold1of2 was trained before file://.* changed"):
        _finished(run, remote, digest)

"""The loop teacher -> export -> score -> student, and which pseudo-labels are used."""

import csv
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest
from conftest import SMALL, TrainedRun, code_of
from PIL import Image
from run_folders import make_run
from train_data import draw, flat_set, settings

from pipelines import pseudo_label
from pipelines import teacher as teachers
from pipelines.pseudo_label import build_parser, check_settings, labelled, soft_labels
from pipelines.teacher import (
    PseudoLabels,
    check_skill,
    read_scores,
    score_folder,
    select,
    warn_of_collapse,
    without_labelled,
)
from train.checkpoint import load_checkpoint, save_checkpoint
from train.data.index import prepare_data
from train.data.layouts.label_file import read
from train.evaluation.predictions import StoredAnswers


def found(rows: list[list[float]]) -> PseudoLabels:
    names = tuple(f"class{i}" for i in range(len(rows[0])))
    return PseudoLabels([f"/{i}.jpg" for i in range(len(rows))], np.array(rows), names)


ROWS = [[0.95, 0.05], [0.6, 0.4], [0.99, 0.01], [0.91, 0.09], [0.02, 0.98], [0.3, 0.7]]


def test_only_confident_pseudo_labels_are_taken() -> None:
    chosen = select(found(ROWS), 0.9, balance=False)
    assert chosen.paths == ["/2.jpg", "/0.jpg", "/3.jpg", "/4.jpg"]
    assert chosen.names == ["class0", "class0", "class0", "class1"]
    assert select(found(ROWS), 0.0, balance=False).counts() == {"class0": 4, "class1": 2}


def test_balance_takes_equally_many_the_most_confident() -> None:
    chosen = select(found(ROWS), 0.5, balance=True)
    assert chosen.paths == ["/2.jpg", "/0.jpg", "/4.jpg", "/5.jpg"]


def test_a_class_without_a_confident_pseudo_label_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert select(found(ROWS), 0.99, balance=False).counts() == {"class0": 1, "class1": 0}
    assert re.search(r"warning: .*class1.*--threshold 0\.99", capsys.readouterr().err)
    with pytest.raises(ValueError, match=r"class1.*--threshold .*--balance"):
        select(found(ROWS), 0.99, balance=True)
    with pytest.raises(ValueError, match=r"'class0', 'class1' .*--threshold 1"):
        select(found(ROWS), 1.0, balance=False)


def test_pseudo_labels_that_are_mostly_of_one_class_are_a_warning() -> None:
    (warning,) = warn_of_collapse({"cat": 96, "dog": 4}, {"cat": 500, "dog": 500})
    assert re.search(r"96%.*'cat'.*50%.*--balance", warning)
    assert warn_of_collapse({"cat": 96, "dog": 4}, {"cat": 900, "dog": 100}) == []


def test_images_that_could_not_be_scored_are_left_out(tmp_path: Path) -> None:
    text = "path,label,probability,probability_cat,probability_dog,error\n"
    text += "a.jpg,dog,0.8,0.2,0.8,\nb.jpg,,,,,truncated\n"
    (tmp_path / "scores.csv").write_text(text)
    read = read_scores(tmp_path / "scores.csv", tmp_path)
    assert (read.paths, read.names, read.class_names) == ([f"{tmp_path}/a.jpg"], ["dog"], ("cat", "dog"))


def test_scores_with_gaps_of_an_outage_are_completed_before_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = "path,label,probability,probability_cat,probability_dog,error\n"
    row, gap = "a.jpg,dog,0.8,0.2,0.8,\n", "a.jpg,,,,,Input/output error\n"
    answers = [gap, row]

    def call(program: str, *arguments: Path) -> None:
        if program == "serve/main.py":
            answer = answers.pop(0)
            arguments[arguments.index("--output") + 1].write_text(header + answer)  # type: ignore[arg-type]
            if answer == gap:
                raise subprocess.CalledProcessError(3, program)

    monkeypatch.setattr(teachers, "run_program", call)
    with pytest.raises(subprocess.CalledProcessError):
        score_folder(tmp_path, tmp_path, tmp_path / "scores-1.csv")
    for _ in range(2):
        read = score_folder(tmp_path, tmp_path, tmp_path / "scores-1.csv")
        assert (read.paths, answers) == ([f"{tmp_path}/a.jpg"], [])
    assert [path.name for path in tmp_path.iterdir()] == ["scores-1.csv"]


def test_a_teacher_that_is_exported_keeps_what_lies_beside_its_model(
    exported: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """export/main.py deletes quantised files, embeddings and the verification on other providers."""
    run = shutil.copytree(exported.folder, tmp_path / "run")
    called: list[str] = []

    def call(program: str, *arguments: Path) -> None:
        called.append(program)
        if program == "serve/main.py":
            scores = arguments[arguments.index("--output") + 1]
            scores.write_text("path,label,probability,probability_cat,probability_dog,error\n")

    monkeypatch.setattr(teachers, "run_program", call)
    score_folder(run, tmp_path, tmp_path / "scores-1.csv")
    assert called == ["serve/main.py"]
    best = run / "checkpoints" / "best.pt"
    best.write_bytes(best.read_bytes() + b"trained further")
    score_folder(run, tmp_path, tmp_path / "scores-2.csv")
    assert called == ["serve/main.py", "export/main.py", "serve/main.py"]


def test_settings_can_change_until_a_round_is_labelled(tmp_path: Path) -> None:
    """Or an error that says to lower --threshold could not be followed."""

    def check(threshold: float) -> None:
        given = ["--teacher", "t", "--unlabelled", "u", "--threshold", str(threshold)]
        check_settings(tmp_path / "settings.json", build_parser().parse_args(given))

    check(0.9)
    (tmp_path / "scores-1.csv").touch()
    check(0.8)
    assert not (tmp_path / "scores-1.csv").exists()
    (tmp_path / "train-1.csv").touch()
    check(0.8)
    with pytest.raises(ValueError, match=r"--threshold 0\.8 -> 0\.7"):
        check(0.7)


def make_right(run: Path) -> None:
    """Let a run of an epoch or two pass for one that learnt something, which a teacher has to be."""
    answers = StoredAnswers.load(run)
    replace(answers, logits=np.eye(len(answers.class_names))[answers.labels]).save(run)


@pytest.mark.parametrize(("skill", "taken"), [(0.0, False), (3.0, True)])
def test_a_teacher_at_chance_is_refused(tmp_path: Path, skill: float, taken: bool) -> None:
    run = make_run(tmp_path / "a", n=200, skill=skill)
    if taken:
        check_skill(run)
    else:
        with pytest.raises(ValueError, match=r"/a .*--weights"):
            check_skill(run)


def test_a_teacher_that_always_names_the_largest_class_is_refused(tmp_path: Path) -> None:
    """It would be sure of all unlabelled images."""
    labels = (np.arange(400) % 20 > 0).astype(int)
    paths = [f"{i}.png" for i in range(400)]
    StoredAnswers(paths, labels, ("cat", "dog"), np.tile([0.0, 3.0], (400, 1))).save(tmp_path)
    with pytest.raises(ValueError, match=r"0\.9500 .*400"):
        check_skill(tmp_path)


def test_two_rounds_of_students(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real commands. Copies of labelled images among the unlabelled ones, re-encoded ones too, are not
    used."""
    monkeypatch.chdir(tmp_path)
    called: list[str] = []

    def call(program: str, *arguments: object, processes: int = 1) -> None:
        called.append(program)
        forked.run(program, *arguments, cwd=tmp_path)

    for module in (pseudo_label, teachers):
        monkeypatch.setattr(module, "run_program", call)
    teacher = shutil.copytree(trained.folder, tmp_path / "teacher")
    unlabelled = shutil.copytree(trained.sample / "test", tmp_path / "unlabelled")
    for i in range(10):
        shutil.copy(trained.sample / "train" / f"cat.{i}.jpg", unlabelled / f"copy{i}.jpg")
        with Image.open(trained.sample / "train" / f"dog.{i}.jpg") as image:
            image.save(unlabelled / f"encoded{i}.jpg", quality=80)
    make_right(teacher)
    command = ["--teacher", teacher, "--unlabelled", unlabelled, "--threshold", 0.5, "--rounds"]
    flags = ["--", *SMALL, "--epochs", 1, "--dropout", 0.3, "--name", "student", "--track", "false"]
    assert pseudo_label.main([str(argument) for argument in [*command, 1, *flags]]) == 0
    assert called == ["export/main.py", "serve/main.py", "train/main.py"]
    assert "of 40 unlabelled images 20 are used" in capsys.readouterr().out
    runs = tmp_path / "runs"
    label_file = runs / "student-labels" / "train-1.csv"
    found = read(label_file)
    labels, soft = found.labels, found.probabilities
    assert len(labels) == 136 + 20
    assert sorted(Path(path).name for path in soft) == sorted(f"{i}.jpg" for i in range(1, 21))

    state = load_checkpoint(runs / "student-1" / "checkpoints" / "best.pt")
    assert state["config"]["dropout"] == 0.3
    with (runs / "student-1" / "val_predictions.csv").open(newline="") as file:
        validated = sorted(Path(row["path"]).name for row in csv.DictReader(file))
    with (trained.folder / "val_predictions.csv").open(newline="") as file:
        assert validated == sorted(row["path"] for row in csv.DictReader(file)), "teacher's and student's"

    before = label_file.stat().st_mtime_ns
    make_right(runs / "student-1")
    called.clear()
    assert pseudo_label.main([str(argument) for argument in [*command, 2, *flags]]) == 0
    assert label_file.stat().st_mtime_ns == before, "the first round is not repeated"
    # its student is found finished
    assert called == ["train/main.py", "export/main.py", "serve/main.py", "train/main.py"]
    assert (runs / "student-2" / "checkpoints" / "best.pt").is_file()


def test_unusable_requests_are_one_clear_line(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def refused(*arguments: object) -> str:
        assert code_of(pseudo_label.main, *command, *arguments) == 2
        return capsys.readouterr().err

    run = shutil.copytree(trained.folder, tmp_path / "teacher", ignore=shutil.ignore_patterns("export"))
    command = ["--teacher", run, "--unlabelled", trained.sample / "test"]
    assert re.fullmatch(r"error: --rounds 0 .*1\.\.1000.*\n", refused("--rounds", 0))
    assert re.fullmatch("error: --folds .*\n", refused("--", "--folds", 3, "--fold", 1))
    for name in ("data", "val-data", "exclude", "resume"):
        assert re.fullmatch(f"error: --{name} .*\n", refused("--", f"--{name}", tmp_path))
    assert re.fullmatch("error: --data-format .*\n", refused("--", "--data-format", "tar"))
    assert re.fullmatch("error: --stop-after .*\n", refused("--", "--stop-after", 1))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").touch()
    assert "--unlabelled 'tars'" in refused("--unlabelled", "tars")
    state = load_checkpoint(run / "checkpoints" / "best.pt")
    save_checkpoint({**state, "data_digest": "of other data"}, run / "checkpoints" / "best.pt")
    assert re.fullmatch(f"error: .*{run}.*\n", refused())


def test_unlabelled_copies_of_labelled_images_are_not_used(tmp_path: Path) -> None:
    flat_set(tmp_path / "images", 5)
    config = settings(tmp_path)
    data = prepare_data(config)
    copies = [shutil.copy(path, tmp_path / f"{i}.png") for i, path in enumerate(labelled(data.train)[0])]
    other = draw(tmp_path / "new.png", 2)

    def predicted(*paths: Path) -> PseudoLabels:
        return PseudoLabels([str(p) for p in paths], np.full((len(paths), 2), 0.5), ("cat", "dog"))

    assert without_labelled(predicted(*copies, other), data, config).paths == [str(other)]
    with pytest.raises(ValueError, match=r"8 of 8 .*--unlabelled"):
        without_labelled(predicted(*copies), data, config)


def test_soft_labels_of_a_teacher_are_its_students_too(tmp_path: Path) -> None:
    flat_set(tmp_path / "images", 10)
    rows = [f"images/{name}.{i}.png,{name},0.6,0.4" for name in ("cat", "dog") for i in range(10)]
    header = "path,label,probability_cat,probability_dog"
    (tmp_path / "soft.csv").write_text("\n".join([header, *rows]))
    data = prepare_data(settings(tmp_path, data=str(tmp_path / "soft.csv")))
    soft = soft_labels(data.train)
    assert soft.keys() == set(labelled(data.train)[0])
    assert all(np.allclose(values, [0.6, 0.4]) for values in soft.values())

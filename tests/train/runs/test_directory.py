"""The run directory: made once, never overwritten, complete."""

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_data import draw, flat_set, settings

from train.checkpoint import load_checkpoint
from train.cli import parse_config
from train.config import TrainConfig
from train.data.index import Data
from train.engine.prepare import prepare
from train.evaluation.calibration import log_probabilities
from train.evaluation.metrics import evaluate_logits
from train.evaluation.predictions import read_predictions
from train.runs.directory import STATUS, create_run_folder, read_status, run_folder, save_best, write_status


def ready(tmp_path: Path, **changes: Any) -> TrainConfig:
    config = settings(tmp_path, **changes)
    flat_set(Path(config.data))
    return config


def opened(config: TrainConfig) -> tuple[TrainConfig, Data]:
    config, data = prepare(config)
    create_run_folder(config, data)
    return config, data


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_run_gets_a_folder_with_its_settings(tmp_path: Path) -> None:
    config, data = opened(ready(tmp_path, name="a", lr=0.25))
    folder = run_folder(config)
    assert folder == tmp_path / "runs" / "a"
    assert parse_config(["--config", str(folder / "config.yaml")]) == config
    assert read_csv(folder / "bad_files.csv") == [["path", "reason"]]
    assert len(data.train) + len(data.val) == 12


def test_without_a_name_it_is_time_and_model(tmp_path: Path) -> None:
    config, _ = opened(ready(tmp_path, model="timm/resnet10t"))
    assert config.name.endswith("-timm-resnet10t")
    assert run_folder(config).is_dir()


def test_a_name_that_something_else_has_is_refused(tmp_path: Path) -> None:
    config = ready(tmp_path, name="a")
    opened(config)
    (run_folder(config) / "config.yaml").write_text("mine")
    with pytest.raises(ValueError, match=r"runs/a'.*--name"):
        prepare(config)
    assert (run_folder(config) / "config.yaml").read_text() == "mine"


def test_an_unfinished_run_of_the_same_name_and_settings_is_continued(tmp_path: Path) -> None:
    config = ready(tmp_path, name="a")
    opened(config)
    again, _ = prepare(config.replace(num_workers=3, epochs=9))
    assert Path(again.resume).resolve() == run_folder(config).resolve()
    assert prepare(config.replace(name="b"))[0].resume == ""
    with pytest.raises(ValueError, match=r"runs/a'.*--lr 0.01 -> 0.5"):
        prepare(config.replace(lr=0.5))


def test_an_output_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    config = ready(tmp_path).replace(output=str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"--output.*file'"):
        opened(config)


def test_unusable_data_leave_no_run_behind(tmp_path: Path) -> None:
    flat_set(tmp_path / "images", names=("cat",))
    with pytest.raises(ValueError, match="cat"):
        prepare(settings(tmp_path, name="a"))
    assert not (tmp_path / "runs" / "a").exists()


def test_unreadable_files_are_listed(tmp_path: Path) -> None:
    config = ready(tmp_path, name="a", max_bad=0.5)
    for name in ("cat.90.png", "a\nb.1.png"):
        (Path(config.data) / name).write_text("hello")
    draw(Path(config.data) / "a\nb.2.png", 2, 2)
    draw(Path(config.data) / "a\nb.3.png", 2, 3)
    _, data = opened(config)
    rows = read_csv(run_folder(config) / "bad_files.csv")
    assert [Path(row[0]).name for row in rows[1:]] == ["a\nb.1.png", "cat.90.png"]
    assert all("not an image file" in row[1] for row in rows[1:])
    assert any("2 unreadable" in note and "bad_files.csv" in note for note in data.notes)


def test_duplicates_are_listed_and_drawn_when_there_are_any(tmp_path: Path) -> None:
    config = ready(tmp_path, name="a")
    shutil.copy(Path(config.data) / "cat.0.png", Path(config.data) / "cat.90.png")
    _, data = opened(config)
    folder = run_folder(config)
    assert [row[1] for row in read_csv(folder / "duplicates.csv")[1:]] == ["cat.0.png", "cat.90.png"]
    assert (folder / "figures" / "duplicates.png").is_file()
    assert any(str(folder / "duplicates.csv") in note for note in data.notes)
    _, data = opened(config.replace(name="b", exclude=str(folder / "duplicates.csv")))
    assert len(data.train) + len(data.val) == 11
    assert not (tmp_path / "runs" / "b" / "duplicates.csv").exists()


def test_a_resumed_run_keeps_a_list_of_duplicates_that_was_edited(tmp_path: Path) -> None:
    config = ready(tmp_path, name="a")
    shutil.copy(Path(config.data) / "cat.0.png", Path(config.data) / "cat.90.png")
    opened(config)
    table = run_folder(config) / "duplicates.csv"
    edited = "".join(table.read_text().splitlines(keepends=True)[:-1])
    table.write_text(edited)
    opened(parse_config(["--resume", str(run_folder(config))]))
    assert table.read_text() == edited


def resumed(tmp_path: Path, *flags: str) -> TrainConfig:
    return parse_config(["--resume", str(tmp_path / "runs" / "a"), *flags])


def test_a_resumed_run_keeps_its_folder_wherever_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(ready(tmp_path, name="a"))
    monkeypatch.chdir(tmp_path / "runs")
    config, _ = opened(parse_config(["--resume", "a", "--epochs", "9"]))
    assert run_folder(config) == tmp_path / "runs" / "a"
    assert resumed(tmp_path).epochs == 9


def test_a_resume_that_is_refused_leaves_the_runs_settings(tmp_path: Path) -> None:
    opened(ready(tmp_path, name="a", lr=0.25))
    prepare(resumed(tmp_path, "--lr", "0.5"))  # restore() refuses it
    assert resumed(tmp_path).lr == 0.25


def test_the_best_epoch_leaves_its_checkpoint_and_predictions(tmp_path: Path) -> None:
    config, data = opened(ready(tmp_path, name="a"))
    folder = run_folder(config)
    logits = np.eye(2)[data.val.labels]
    result = evaluate_logits(logits, data.val.labels, data.val.class_names)
    state = {"model": {}, "ema": None, "optimizer": {"x": 1}, "scheduler": {}, "scaler": {}, "epoch": 1}
    save_best(folder, state, data, result, config)
    best = load_checkpoint(folder / "checkpoints" / "best.pt")
    assert best["epoch"] == 1
    assert "optimizer" not in best
    assert read_predictions(folder).accuracy == 1.0


@pytest.mark.parametrize("calibrate", [True, False])
def test_predictions_and_best_checkpoint_have_the_same_temperature(tmp_path: Path, calibrate: bool) -> None:
    config, data = opened(ready(tmp_path, name="a", calibrate=calibrate, clip_probabilities=0.01))
    folder = run_folder(config)
    logits = np.eye(2)[data.val.labels] * 0.5
    result = evaluate_logits(logits, data.val.labels, data.val.class_names)
    weights = {"temperature": torch.ones(())}
    state = {"model": weights, "ema": weights, "optimizer": {}, "scheduler": {}, "scaler": {}}
    save_best(folder, state, data, result, config)
    best = load_checkpoint(folder / "checkpoints" / "best.pt")
    temperature = float(best["ema"]["temperature"])
    assert temperature == float(best["model"]["temperature"])
    assert (temperature < 0.5) if calibrate else (temperature == 1.0)
    assert float(state["ema"]["temperature"]) == 1.0, "training continues without"
    written = read_predictions(folder).probabilities
    expected = np.exp(log_probabilities(logits, temperature, 0.01))
    np.testing.assert_allclose(written, expected, atol=1e-6)


def test_a_status_is_what_was_written_last_and_one_that_is_damaged_resumes_the_run(tmp_path: Path) -> None:
    assert read_status(tmp_path) == ""
    for status in ("RUNNING", "FINISHED"):
        write_status(tmp_path, status)
        assert read_status(tmp_path) == status
    for damaged in ("", "{}", "[1]"):
        (tmp_path / STATUS).write_text(damaged)
        assert read_status(tmp_path) == ""

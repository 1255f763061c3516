"""The report: figures of the best epoch, and a summary that does not flatter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from train_data import linear_model, make_data

from train.checkpoint import save_checkpoint
from train.config import TrainConfig
from train.evaluation.metrics import evaluate_logits
from train.evaluation.predictions import Predictions
from train.models.build import build_model
from train.models.subject_crop.build import add_subject_crop
from train.runs.directory import create_run_folder, run_folder, save_best
from train.runs.history import History
from train.runs.report import draw_subject_crops, epoch_line, training_summary, write_run_report
from train.tracking.base import MetricsFile


@pytest.mark.parametrize(("calibrate", "shown"), [(True, "0.2500"), (False, "0.5000")])
def test_an_epochs_line_shows_the_log_loss_that_decides_which_is_best(calibrate: bool, shown: str) -> None:
    values = {"val/accuracy": 0.9, "val/log_loss": 0.5, "val/log_loss_calibrated": 0.25, "lr": 0.1}
    line = epoch_line(
        History(1, 1), TrainConfig(calibrate=calibrate), values | {"images_per_second": 9.0}, True
    )
    assert [number for number in ("0.2500", "0.5000") if number in line] == [shown]


def answers(labels: NDArray[np.int64], right: int) -> Predictions:
    """Predictions of these labels, the first `right` of them right."""
    predicted = np.where(np.arange(len(labels)) < right, labels, 1 - labels)
    probabilities = np.eye(2)[predicted]
    paths = [str(i) for i in range(len(labels))]
    return Predictions("", paths, labels, predicted, np.zeros(len(labels)), probabilities, ("cat", "dog"))


BEST = {"val/accuracy": 0.9, "val/log_loss": 0.3, "val/log_loss_calibrated": 0.25, "val/f1_macro": 0.5}


def test_the_summary_has_the_interval_and_a_command_that_a_shell_takes() -> None:
    even = answers(np.arange(100) % 2, 90)
    printed = training_summary(
        History(3, 2, BEST), TrainConfig(epochs=3), even, str(Path("runs") / "my pets")
    )
    assert all(number in printed for number in ("0.9000", "0.8256", "0.9448", "100", "0.3000", "0.2500"))
    assert printed.endswith("--run 'runs/my pets'")
    assert "--stop-after" not in printed
    assert "warning" not in printed
    assert "top5" not in printed
    best = BEST | {"val/top5_accuracy": 0.98}
    assert "0.9800" in training_summary(History(3, 2, best), TrainConfig(epochs=3), even, "runs/a")


def test_an_accuracy_that_the_largest_class_explains_is_doubted_with_a_cure() -> None:
    unequal = answers((7 * np.arange(100) % 100 >= 85).astype(np.int64), 90)
    printed = training_summary(History(3, 2, BEST), TrainConfig(epochs=4), unequal, "runs/a")
    stopped, _, doubt, *_ = printed.splitlines()
    assert "3" in stopped
    assert "4" in stopped
    assert "--stop-after" in stopped
    assert doubt.startswith("warning: ")
    assert "0.8500" in doubt
    assert "--class-weights" in doubt
    few = training_summary(
        History(3, 2, BEST | {"val/accuracy": 1.0}),
        TrainConfig(epochs=3),
        answers(np.arange(2), 2),
        "runs/a",
    )
    assert "--val-fraction" in few
    assert "--class-weights" not in few


def test_the_report_logs_all_files_of_the_run_with_their_figures(tmp_path: Path) -> None:
    class Recorder(MetricsFile):
        def log_files(self, paths: list[Path]) -> None:
            logged.extend(paths)

    logged: list[Path] = []
    config, data = make_data(tmp_path, name="a")
    create_run_folder(config, data)
    folder = run_folder(config)
    result = evaluate_logits(np.eye(2)[data.val.labels], data.val.labels, data.val.class_names)
    state: dict[str, Any] = {"model": {}, "ema": None, "optimizer": {}, "scheduler": {}, "scaler": {}}
    save_best(folder, state, data, result, config)
    tracker = Recorder(folder / "metrics.jsonl", 0)
    values = {"train/loss": 1.0, "val/loss": 1.0, "train/accuracy": 0.5, "val/accuracy": 0.5}
    tracker.log_metrics(1, values)
    write_run_report(folder, linear_model(), History(1, 1, values), data, config, tracker, str(folder))
    assert {path.name for path in logged} >= {"config.yaml", "metrics.jsonl", "figures", "best.pt"}
    assert all(path.exists() for path in logged)
    assert (folder / "figures" / "curves.png").is_file()
    _, other = make_data(tmp_path / "other", per_class=3, name="a")
    with pytest.raises(AssertionError):
        write_run_report(folder, linear_model(), History(1, 1, values), other, config, tracker, "")


def test_the_squares_that_the_best_epoch_cuts_out_are_drawn(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, name="a", image_size=32, subject_crop="cam")
    model, _ = build_model("simple_cnn", 2, 32)
    add_subject_crop(model, config.to_dict(), config.preprocess().size)
    best = {"model": build_model("simple_cnn", 2, 32)[0].state_dict(), "ema": None, "crops_subject": True}
    save_checkpoint(best, run_folder(config) / "checkpoints" / "best.pt")
    draw_subject_crops(run_folder(config), model, data, config)
    assert torch.equal(model.network.features[0].weight, best["model"]["network.features.0.weight"])
    with Image.open(run_folder(config) / "figures" / "subject_crops.png") as image:
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert ((colours == [255, 255, 0]).all(1)).sum() > 100, "no yellow square"

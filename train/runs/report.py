"""The report of a run: a line for each epoch, figures at the end, and a summary with its certainty."""

from pathlib import Path

import numpy as np

from train.checkpoint import best_checkpoint, load_checkpoint
from train.config import TrainConfig
from train.data.index import Data
from train.evaluation.classes import write_class_tables
from train.evaluation.predictions import Predictions, finish_predictions, read_predictions
from train.models.classifier import ImageClassifier
from train.runs.history import History
from train.runs.note import export_command, run_note
from train.tracking.base import NullTracker
from train.tracking.contents import artifacts

TOP5 = "val/top5_accuracy"


def epoch_line(history: History, config: TrainConfig, values: dict[str, float], improved: bool) -> str:
    served = f"val/log_loss{'_calibrated' if config.calibrate else ''}"  # which decides between epochs
    names = ("train/loss", "train/accuracy", "val/loss", "val/accuracy", TOP5, served)
    shown = "".join(f"{name} {values[name]:.4f}, " for name in names if name in values)
    return (
        f"epoch {history.epochs_done}/{config.epochs + config.retune_epochs}: {shown}"
        f"lr {values['lr']:.2e}, {values['images_per_second']:.0f} images/s{' *best*' if improved else ''}"
    )


def write_run_report(
    folder: Path,
    model: ImageClassifier,
    history: History,
    data: Data,
    config: TrainConfig,
    tracker: NullTracker,
    location: str,
) -> Predictions:
    """Draw figures, write tables and the page of the best epoch, and log the run's files and its note.

    Returns the predictions of the best epoch. `model` gets the best weights; `location` is where users
    find the run directory, a path or URL."""
    from train.evaluation.figures import save_figures  # half a second, which the start need not spend
    from train.evaluation.html_report import REPORT
    from train.runs.results import RunResult
    from train.runs.run_page import write_run_page

    if config.subject_crop != "none":
        draw_subject_crops(folder, model, data, config)
    finish_predictions(folder)
    predictions = read_predictions(folder)
    assert predictions.paths == list(data.val.paths), f"{predictions.source} is of other images"
    save_figures(
        folder / "figures", tracker.rows, history.best_epoch, predictions, data.val, config.preprocess()
    )
    for line in write_class_tables(folder, predictions):
        print(line, flush=True)
    result = RunResult(config.name, folder, config, list(tracker.rows), history.best_epoch, predictions)
    counts = data.train.counts()
    write_run_page(folder / REPORT, result, location, data.val.root, data.digest, counts)
    tracker.log_best(history.best_epoch, history.best)
    tracker.log_note(run_note(predictions, history, location))
    tracker.log_files(artifacts(folder))
    return predictions


def draw_subject_crops(folder: Path, model: ImageClassifier, data: Data, config: TrainConfig) -> None:
    """Draw what the best epoch's weights cut out of validation images."""
    from train.evaluation.figures import save_subject_crops

    best = load_checkpoint(best_checkpoint(folder))
    model.load_state_dict(best["ema"] or best["model"])
    assert model.subject is not None
    model.subject.active = best["crops_subject"]
    path = folder / "figures" / "subject_crops.png"
    save_subject_crops(path, model, data.val, config.preprocess())


def training_summary(history: History, config: TrainConfig, predictions: Predictions, folder: str) -> str:
    """Return the metrics of the best epoch, whose predictions these are, doubts about them, and the next
    command."""
    from train.evaluation.significance import (  # which other ranks need not import
        accuracy_interval,
        better_than_largest,
    )

    best, labels = history.best, predictions.labels
    num_val, accuracy = len(labels), accuracy_interval(predictions.correct)
    top = f"{TOP5} {best[TOP5]:.4f}, " if TOP5 in best else ""
    lines = []
    if not history.complete(config):
        lines.append(
            f"stopped after {history.epochs_done} of {config.epochs + config.retune_epochs} epochs by "
            "--stop-after"
        )
    lines.append(
        f"best epoch {history.best_epoch}: val/accuracy {accuracy.value:.4f} (95 % interval "
        f"{accuracy.low:.4f} to {accuracy.high:.4f}, {num_val} validation images), {top}val/log_loss "
        f"{best['val/log_loss']:.4f} (calibrated {best['val/log_loss_calibrated']:.4f})"
    )
    if not better_than_largest(predictions.correct, labels):
        cure = "Train it longer"
        if config.class_weights == "none":
            cure += ", or with --class-weights balanced where classes differ in size"
        if not better_than_largest(np.ones(num_val, bool), labels):
            cure = "No model could be, on so few: validate on more, by --val-fraction or --folds"
        lines.append(
            f"warning: always naming the largest class would be right for "
            f"{np.bincount(labels).max() / num_val:.4f} of them, and the model is not surely better; "
            f"val/f1_macro is {best['val/f1_macro']:.4f}. {cure}"
        )
    lines += [f"run directory {folder}", f"next: {export_command(folder)}"]
    return "\n".join(lines)

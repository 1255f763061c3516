"""report.html of a run: its settings, data, metrics and curves, around what its predictions show."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from serve.contract.command_line import command
from serve.contract.confidence import fit_threshold
from serve.contract.urls import redact
from train.config import SETTINGS, TrainConfig
from train.evaluation.classes import class_intervals
from train.evaluation.html_report import Measure, Report, write_report
from train.evaluation.predictions import Predictions
from train.evaluation.significance import (
    Interval,
    accuracy_interval,
    ece_interval,
    mean_interval,
    share_interval,
)
from train.runs.note import export_command, scoring_command
from train.runs.results import RunResult
from train.settings import flag

ALWAYS_SHOWN = ("model", "weights", "image_size", "optimizer", "lr", "batch_size", "epochs", "seed")


def commands_of(location: str) -> list[tuple[str, str]]:
    """Return (what for, command) of a finished run at a path or URL."""
    return [
        ("export the best epoch's model, verified, to ONNX", export_command(location)),
        ("then score images (DIR is their folder)", scoring_command(location)),
        (
            "or evaluate it on other labelled images",
            f"{command('pipelines/evaluate.py')} --model {shlex.quote(location)} --data LABELLED",
        ),
    ]


def write_run_page(
    path: Path, run: RunResult, location: str, root: Path, digest: str, train_counts: Mapping[str, int]
) -> None:
    """Write the page of a run.

    `location` is its directory, a path or URL; `root` is the folder of the validation images, `digest` that
    of the data; `train_counts` are the training images of each class, empty if not known.
    """
    classes, f1_macro = class_intervals(run.predictions)
    report = Report(
        title=f"Run {run.name}",
        facts=run_facts(run, digest, train_counts),
        commands=commands_of(location),
        measures=run_measures(run, f1_macro),
        other="before calibration" if run.config.calibrate else "if it were calibrated",
        predictions=run.predictions,
        root=root,
        classes=classes,
        settings=changed_from_defaults(run.config),
        train_counts=train_counts,
        rows=run.rows,
        best_epoch=run.best_epoch,
        threshold=_threshold(run.predictions),
    )
    write_report(path, report)


def _threshold(p: Predictions) -> float:
    """Return the confidence threshold of the validation answers. Export fits it again, to the exported
    model's answers."""
    return fit_threshold(p.confidence.astype(np.float32), p.correct).probability


def run_measures(run: RunResult, f1_macro: Interval) -> list[Measure]:
    """Return the metrics of the answers as they are served; those of calibration, before it (or after it,
    of a run that is not calibrated) too."""
    p, best, n = run.predictions, run.best, len(run.predictions.paths)

    def other(name: str) -> float | None:
        value = best.get(f"val/{name}" if run.config.calibrate else f"val/{name}_calibrated")
        return None if value is None else float(value)

    measures = [Measure("accuracy", accuracy_interval(p.correct))]
    if "val/top5_accuracy" in best:
        top5 = share_interval(round(best["val/top5_accuracy"] * n), n)
        measures.append(Measure("top-5 accuracy", top5))
    measures += [
        Measure("log loss", mean_interval(p.losses), other("log_loss")),
        Measure("expected calibration error", ece_interval(p.confidence, p.correct), other("ece")),
        Measure("macro F1", f1_macro),
    ]
    if roc_auc := run.roc_auc:
        measures.append(Measure("ROC AUC", roc_auc))
    return measures


def run_facts(run: RunResult, digest: str, train_counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return (name, text) of what was trained, on what, and when."""
    config, p = run.config, run.predictions
    facts = [
        ("model", f"{config.model}, weights: {redact(config.weights or 'random')}"),
        ("training data", redact(config.data)),
        ("validation data", redact(config.val_data or "split off the training data")),
        ("data digest (sha256)", digest),
    ]
    if train_counts:
        facts.append(("training images", _counts(train_counts)))
    counts = np.bincount(p.labels, minlength=len(p.class_names)).tolist()
    facts.append(("validation images", _counts(dict(zip(p.class_names, counts, strict=True)))))
    facts.append(("epochs", f"{len(run.rows)}, the best by {config.best_by}: {run.best_epoch}"))
    if ended := run.rows[-1].get("time"):
        facts.append(("last epoch ended", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(float(ended)))))
    shown = (f"{flag(k)} {v}" for k in ALWAYS_SHOWN if (v := getattr(config, k)) not in (None, ""))
    return [*facts, ("settings", redact(", ".join(shown)))]


def _counts(counts: Mapping[str, int]) -> str:
    smallest, largest = min(counts.values()), max(counts.values())
    each = f"{smallest} each" if smallest == largest else f"{smallest} to {largest} of a class"
    return f"{sum(counts.values())} of {len(counts)} classes ({each})"


def changed_from_defaults(config: TrainConfig) -> list[tuple[str, str]]:
    """Return (flag, value) of settings that are not at their default, without secrets of URLs."""
    return [
        (flag(name), redact(value))
        for name, value in config.to_dict().items()
        if not (SETTINGS[name].location or SETTINGS[name].default == value)
    ]

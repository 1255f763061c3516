"""Files of an evaluation: its metrics (evaluation.json), a table of the classes, and the predictions."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.labelled_scores import Scored
from serve.contract.confidence import Estimate, Threshold, estimate_accuracy
from serve.contract.files import atomic_write
from serve.contract.urls import redact
from serve.predictor import Predictor
from train.evaluation.classes import class_intervals
from train.evaluation.html_report import REPORT, REPORT_START, Measure, Report, write_report
from train.evaluation.metrics import evaluate_logits
from train.evaluation.predictions import COLUMNS, Predictions, StoredAnswers, write_answers
from train.evaluation.significance import (
    Interval,
    accuracy_interval,
    ece_interval,
    mean_interval,
    roc_auc_interval,
    share_interval,
)
from train.evaluation.tables import write_table
from train.runs.directory import write_bad_files
from train.runs.note import scoring_command

FILES = {  # name -> what it begins with
    "evaluation.json": '{\n  "purebred_evaluation": 1',
    "per_class.csv": '"class","images"',
    "predictions.csv": ",".join(f'"{name}"' for name in COLUMNS),
    "bad_files.csv": '"path","reason"',
    REPORT: REPORT_START,
}
PER_CLASS_COLUMNS = (
    *("class", "images", "predicted", "correct", "precision", "precision_low", "precision_high"),
    *("recall", "recall_low", "recall_high", "f1", "f1_low", "f1_high", "taken_for"),
)
LEAST = 1e-15  # probability whose logarithm is taken, as in verification
WORST = 5  # classes that are printed
MEASURE_NAMES = {
    "accuracy": "accuracy",
    "log_loss": "log loss",
    "top5_accuracy": "top-5 accuracy",
    "roc_auc": "ROC AUC",
    "f1_macro": "macro F1",
    "ece": "expected calibration error",
}


@dataclass(frozen=True)
class Summary:
    """What evaluation.json holds."""

    model: str
    model_sha256: str
    model_precision: str
    provider: str
    precision: str
    data: str
    data_digest: str
    layout: str
    num_images: int
    num_scored: int
    num_errors: int
    num_ignored: int
    """Of classes that the model does not know."""
    metrics: Mapping[str, Interval]
    """Of the images that were scored."""
    accuracy_errors_wrong: float
    """With the images that could not be read counted as wrong."""
    per_class: Sequence[Mapping[str, Any]]
    """Rows of per_class.csv, the lowest F1 first."""
    threshold: Threshold | None
    """By which scoring estimates accuracy on this provider; None: the model's file has none."""
    estimated_accuracy: Estimate | None
    """What scoring would estimate of these images, without labels; None of few images."""
    validation: Mapping[str, float]
    """What the model's file says of its own validation set."""
    min_accuracy: float

    @classmethod
    def of(cls, args: argparse.Namespace, predictor: Predictor, sha256: str, scored: Scored) -> "Summary":
        answers, images = served_answers(scored), len(scored.paths)
        predictions = answers.predictions("predictions.csv")
        per_class, f1_macro = class_intervals(predictions)
        metrics = _metrics(predictions, answers.logits, f1_macro)
        metadata = predictor.metadata
        profile = metadata.validation_on(predictor.provider, predictor.precision)
        threshold, estimate = profile.threshold if profile else None, None
        if threshold:
            above = int((scored.probabilities.max(axis=1) > threshold.probability).sum())
            estimate = estimate_accuracy(above, images, threshold)
        return cls(
            model=redact(args.model),
            model_sha256=sha256,
            model_precision=metadata.precision,
            provider=predictor.provider,
            precision=predictor.precision,
            data=redact(args.data),
            data_digest=scored.digest,
            layout=scored.data.found.layout,
            num_images=images + len(scored.bad),
            num_scored=images,
            num_errors=len(scored.bad),
            num_ignored=sum(scored.data.ignored.values()),
            metrics=metrics,
            accuracy_errors_wrong=metrics["accuracy"].value * images / (images + len(scored.bad)),
            per_class=[{name: row[name] for name in PER_CLASS_COLUMNS} for row in per_class],
            threshold=threshold,
            estimated_accuracy=estimate,
            validation=metadata.metrics,
            min_accuracy=args.min_accuracy,
        )

    @cached_property
    def accuracy(self) -> float:
        return self.metrics["accuracy"].value

    def flat_metrics(self) -> dict[str, float]:
        """Return metric -> value, with low and high ends of intervals, without those that are not known."""
        ends = {
            f"{name}{suffix}": value
            for name, interval in self.metrics.items()
            for suffix, value in zip(("", "_low", "_high"), interval, strict=True)
        }
        if self.estimated_accuracy:
            ends["estimated_accuracy"] = self.estimated_accuracy.accuracy
        ends |= {"images": self.num_scored, "errors": self.num_errors, "ignored": self.num_ignored}
        return {name: float(value) for name, value in ends.items() if math.isfinite(value)}

    def parameters(self) -> dict[str, str]:
        names = ("model", "model_sha256", "model_precision", "provider", "precision", "data", "data_digest")
        return {name: str(getattr(self, name)) for name in (*names, "layout", "min_accuracy")}

    def to_json(self) -> str:
        values = {"purebred_evaluation": 1, **asdict(self)}
        values["metrics"] = {
            name: {end: _known(value) for end, value in interval._asdict().items()}
            for name, interval in self.metrics.items()
        }
        values["validation"] = {name: _known(value) for name, value in self.validation.items()}
        values["passed"] = self.accuracy >= self.min_accuracy
        return json.dumps(values, indent=2, allow_nan=False) + "\n"


def served_answers(scored: Scored) -> StoredAnswers:
    """Return the answers as those of a run; logits are the logarithms of the served probabilities."""
    logits = np.log(np.maximum(scored.probabilities.astype(np.float64), LEAST))
    return StoredAnswers(scored.paths, scored.labels, scored.data.class_names, logits)


def _metrics(
    predictions: Predictions, log_probs: NDArray[np.float64], f1_macro: Interval
) -> dict[str, Interval]:
    labels = predictions.labels
    values = evaluate_logits(log_probs, labels, predictions.class_names).values
    metrics = {
        "accuracy": accuracy_interval(predictions.correct),
        "log_loss": mean_interval(predictions.losses),
    }
    if "top5_accuracy" in values:
        right = round(values["top5_accuracy"] * len(labels))
        metrics["top5_accuracy"] = share_interval(right, len(labels))
    if "roc_auc" in values:  # each class has images
        metrics["roc_auc"] = roc_auc_interval(labels, predictions.probabilities)
    return metrics | {
        "f1_macro": f1_macro,
        "ece": ece_interval(predictions.confidence, predictions.correct),
    }


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_evaluation(folder: Path, summary: Summary, scored: Scored, page: Report) -> None:
    """Write FILES; evaluation.json is last, so that it is there when all are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").unlink(missing_ok=True)
    write_table(folder / "per_class.csv", summary.per_class)
    write_answers(folder / "predictions.csv", served_answers(scored))
    write_bad_files(folder, scored.bad)
    write_report(folder / REPORT, page)
    with atomic_write(folder / "evaluation.json", "w") as file:
        file.write(summary.to_json())


def evaluation_page(summary: Summary, scored: Scored) -> Report:
    """Return what report.html shows of an evaluation, and the terminal in short."""
    own = {"accuracy": "val/accuracy", "top5_accuracy": "val/top5_accuracy", "f1_macro": "val/f1_macro"}
    measures = [
        Measure(MEASURE_NAMES[name], interval, summary.validation.get(own.get(name, "")))
        for name, interval in summary.metrics.items()
    ]
    if found := summary.estimated_accuracy:
        interval = Interval(found.accuracy, found.low, found.high)
        measures.insert(1, Measure("accuracy as scoring estimates it, without labels", interval))
    return Report(
        title=f"Evaluation of {summary.model}",
        facts=[
            *((name.replace("_", " "), value) for name, value in summary.parameters().items()),
            ("images", f"{summary.num_scored} of {summary.num_images} could be read"),
        ],
        commands=[("score images with this model (DIR is their folder)", scoring_command(summary.model))],
        measures=measures,
        other="in validation" if summary.validation else "",
        predictions=served_answers(scored).predictions("predictions.csv"),
        root=scored.data.found.root,
        classes=summary.per_class,
        threshold=summary.threshold.probability if summary.threshold else None,
        warnings=_warnings(summary, scored),
    )


def _warnings(summary: Summary, scored: Scored) -> list[str]:
    found = []
    if absent := sum(not row["images"] for row in summary.per_class):
        found.append(f"{absent} classes of the model have no image here: no ROC AUC")
    if summary.num_ignored:
        names = ", ".join(map(repr, scored.data.ignored))
        found.append(f"{summary.num_ignored} images of unknown classes are left out ({names})")
    if summary.num_errors:
        found.append(
            f"{summary.num_errors} of {summary.num_images} images could not be read (bad_files.csv); they "
            f"are in no metric; counted as wrong, the accuracy is {summary.accuracy_errors_wrong:.4f}"
        )
    return found


def evaluation_lines(page: Report, folder: Path) -> list[str]:
    """Return what to print: each metric with its interval, the worst classes, and what was left out."""
    facts = dict(page.facts)
    lines = [f"{page.title} on the {facts['provider']} provider: {facts['images']}"]
    for name, (value, low, high), other in page.measures:
        interval = f" (95 % interval {low:.4f} to {high:.4f})" if math.isfinite(low) else ""
        before = "" if other is None else f"; {page.other} {other:.4f}"
        lines.append(f"{name} {value:.4f}{interval}{before}")
    for row in [row for row in page.classes if row["images"]][:WORST]:
        taken = f", mostly taken for {row['taken_for']!r}" if row["taken_for"] else ""
        lines.append(
            f"  {row['class']!r}: F1 {row['f1']:.4f}, recall {row['recall']:.4f} of {row['images']} "
            f"images{taken}"
        )
    lines += [f"warning: {warning}" for warning in page.warnings]
    lines.append(f"written: {folder}/{', '.join(FILES)}")
    return lines

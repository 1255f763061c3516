"""The note of a run, which heads its page in MLflow: how good it is, its worst class, the next commands."""

import re
import shlex

from serve.contract.command_line import command
from train.evaluation.classes import class_rows
from train.evaluation.predictions import Predictions
from train.runs.history import History

LONGEST_NAME = 100  # characters of a class name; MLflow takes 5000 of a note


def run_note(predictions: Predictions, history: History, location: str) -> str:
    """Return Markdown about the best epoch.

    `predictions` are that epoch's on the validation images; `location` is the run directory, a path or URL.
    """
    from train.evaluation.significance import accuracy_interval  # which other ranks need not import

    accuracy = accuracy_interval(predictions.correct)
    worst = next(row for row in class_rows(predictions) if row["images"])
    return "\n".join(
        [
            f"**Accuracy {accuracy.value:.4f}** (95 % interval {accuracy.low:.4f} to {accuracy.high:.4f}, "
            f"{len(predictions.labels)} validation images), log loss {predictions.losses.mean():.4f}, "
            f"epoch {history.best_epoch}",
            "",
            f"Worst of {len(predictions.class_names)} classes: {code_span(worst['class'])}, F1 "
            f"{worst['f1']:.4f}, recall {worst['recall']:.4f}, {worst['images']} images",
            "",
            *_indented(export_command(location)),
            *_indented(scoring_command(location)),
        ]
    )


def export_command(location: str) -> str:
    """Return the command that exports the run at a path or URL."""
    return f"{command('export/main.py')} --run {shlex.quote(location)}"


def scoring_command(model: str) -> str:
    """Return the command that scores images with an exported run or a model file."""
    return f"{command('serve/main.py')} --model {shlex.quote(model)} --images DIR --output predictions.csv"


def code_span(text: str) -> str:
    """Return text as Markdown that shows it as it is, on one line and shortened: names are data."""
    line = " ".join(text.split())
    line = line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 3] + "..."
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def _indented(command: str) -> list[str]:
    """Return a block of code, which no character of the command can end."""
    return [f"    {line}" for line in command.splitlines()]

"""Promotion of a registered model's challenger to champion, decided on validation images that both have.

The first champion must be surely better than always naming the largest class: Tango's 95 % interval of the
difference lies above 0. Later challengers must be *not worse*:

1. Accuracy is not lower by the margin (default 0.01): the lower bound of Tango's 90 % interval of the
   difference, which is a one-sided 95 % bound, lies above -margin. Too few images fail this.
2. It is not lower at all beyond chance: the challenger has no less right, or McNemar's p is at least 0.05.
   Otherwise small losses within the margin would add up over promotions.
3. Log loss is not higher beyond chance: the 95 % interval of the paired difference reaches 0 or below.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serve.contract.command_line import command
from serve.contract.errors import UserError
from serve.contract.files import file_sha256
from train.checkpoint import best_checkpoint, load_checkpoint
from train.evaluation.predictions import ARRAYS, Predictions, StoredAnswers
from train.evaluation.significance import (
    CONFIDENCE,
    PairedTest,
    better_than_largest,
    gain_over_largest,
    paired_interval,
)
from train.runs.results import RunResult, check_metrics, paired
from train.tracking.client import TrackingStore
from train.tracking.registry import (
    CHALLENGER,
    ModelVersion,
    fetch_run_file,
    move_alias,
    read_aliases,
    read_version,
)
from train.tracking.run_record import FILE, read_record

CHAMPION = "champion"


@dataclass(frozen=True)
class Decision:
    promote: bool
    reasons: list[str]
    """A line for each condition, and one of advice."""

    @classmethod
    def of(cls, *conditions: tuple[bool, str], advice: str = "") -> "Decision":
        reasons = [f"{'holds' if holds else 'FAILS'}: {text}" for holds, text in conditions]
        return cls(all(holds for holds, _ in conditions), [*reasons, *filter(None, [advice])])


def decide(test: PairedTest, margin: float) -> Decision:
    """Compare the challenger with the champion. A value that is not a number never promotes."""
    alpha = 1 - CONFIDENCE
    bound = paired_interval(test.gained, test.lost, test.num_images, 1 - 2 * alpha).low
    advice = ""
    if not bound > -margin and test.gained >= test.lost:
        advice = (
            f"{test.num_images} shared images cannot rule out a loss of {margin:g}: validate on more "
            "images or accept a wider --margin"
        )
    return Decision.of(
        (
            bound > -margin,
            f"accuracy {test.accuracy.value:+.4f}, lower bound (one-sided 95 %) {bound:+.4f}, "
            f"must be above {-margin:+.4f}",
        ),
        (
            test.gained >= test.lost or test.p >= alpha,
            f"only the challenger is right on {test.gained} images, only the champion on {test.lost}, "
            f"McNemar p {test.p:.3g}, must be at least {alpha:.2f} if accuracy is lower",
        ),
        (
            test.log_loss.low <= 0,
            f"log loss {test.log_loss.value:+.4f} [{test.log_loss.low:+.4f}, {test.log_loss.high:+.4f}], "
            "the interval must reach 0 or below",
        ),
        advice=advice,
    )


def decide_first(predictions: Predictions) -> Decision:
    """Compare a challenger with the share of the largest class, where there is no champion."""
    labels = predictions.labels
    n, gain, advice = len(labels), gain_over_largest(predictions.correct, labels), ""
    if gain.low <= 0:
        advice = "train it longer, or validate on more images"
        if not better_than_largest(np.ones(n, bool), labels):
            advice = f"no model could show it on {n} images: validate on more"
        advice += f"; if accuracy is not what counts, move the alias {CHAMPION} in MLflow"
    return Decision.of(
        (
            gain.low > 0,
            f"accuracy {predictions.accuracy:.4f}, {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] "
            f"to always naming the largest class ({np.bincount(labels).max() / n:.4f}), must be above 0",
        ),
        advice=advice,
    )


def promote(model: str, runs: list[RunResult], margin: float) -> bool:
    """Print the decision, and move the alias if it is to promote; True when champion is challenger.

    Raises UserError without such a model or challenger, for predictions that are not of the registered
    version, without shared images, and if another promotion moved an alias meanwhile.
    """
    if not 0 < margin < 1:
        raise UserError(f"--margin {margin} is outside 0..1: it is a difference of accuracy")
    records = [read_record(run.folder / FILE) for run in runs]
    store = TrackingStore(next((record.uri for record in records if record is not None and record.uri), ""))
    aliases = read_aliases(store, model)
    if CHALLENGER not in aliases:
        raise UserError(
            f"{model} has no version with the alias {CHALLENGER}: make one with "
            f"{command('export/main.py')} --run RUN --register {model}"
        )
    challenger = read_version(store, model, aliases[CHALLENGER])
    name = f"{model} version {challenger.version}"
    found = {run_id_of(run): run for run in runs}
    if challenger.run_id not in found:
        raise UserError(
            f"the {CHALLENGER}, {name}, is of run {challenger.metadata.run_name} ({challenger.run_id}): "
            "give its run directory"
        )
    if aliases.get(CHAMPION) == challenger.version:
        print(f"{name} is {CHAMPION} already")
        return True
    new = predictions_of(store, challenger, found)
    if CHAMPION in aliases:
        champion = read_version(store, model, aliases[CHAMPION])
        test = paired(new, predictions_of(store, champion, found))
        if test is None:
            raise UserError(
                f"{CHALLENGER} and {CHAMPION} of {model} share no validation image: train one of them with "
                f"the other's --val-data, or move the alias {CHAMPION} in MLflow if they need no comparison"
            )
        decision = decide(test, margin)
        against = f"against {CHAMPION} {champion.metadata.run_name} (version {champion.version})"
        images = f"{test.num_images} shared"
    else:
        decision, against, images = decide_first(new), f"without a {CHAMPION}", str(len(new.labels))
    print(
        f"{model}: {CHALLENGER} {challenger.metadata.run_name} (version {challenger.version}) {against}, "
        f"on {images} validation images"
    )
    for reason in decision.reasons:
        print(f"  {reason}")
    if decision.promote:
        move_alias(store, model, CHAMPION, challenger.version, aliases)
    print(f"{name} {f'is {CHAMPION} now' if decision.promote else 'is NOT promoted'}")
    return decision.promote


def run_id_of(run: RunResult) -> str:
    """Return the MLflow run's ID, from the run's record, or else from the best checkpoint."""
    record = read_record(run.folder / FILE)
    if record is not None and record.run_id:
        return record.run_id
    return str(load_checkpoint(best_checkpoint(run.folder), "meta")["run_id"])


def predictions_of(store: TrackingStore, version: ModelVersion, found: dict[str, RunResult]) -> Predictions:
    """Return those of the run directory if it was given, else those that its MLflow run logged. Raises
    UserError if neither has them, or the version's own answers are others."""
    metadata, name = version.metadata, f"version {version.version}"
    if metadata.precision != "fp32":
        raise UserError(
            f"{name} is a file in {metadata.precision}, whose answers to validation images are not kept: "
            f"register the fp32 file, or evaluate both files with {command('pipelines/evaluate.py')} and "
            "move the alias in MLflow"
        )
    if run := found.get(version.run_id):
        checkpoint = best_checkpoint(run.folder)
        if file_sha256(checkpoint) != metadata.checkpoint_sha256:
            raise UserError(
                f"{name} is of another checkpoint than {checkpoint}: export and register it again"
            )
        return run.predictions
    with tempfile.TemporaryDirectory() as folder:
        try:
            fetch_run_file(store, version.run_id, ARRAYS, Path(folder))
        except UserError as error:
            raise UserError(
                f"{name} is of run {metadata.run_name} ({version.run_id}), whose {ARRAYS} is not in MLflow "
                f"({error}): give its run directory"
            ) from error
        answers = StoredAnswers.load(Path(folder))
    source = f"{ARRAYS} of run {version.run_id}"
    check_metrics(answers, source, metadata.metrics, name)
    return answers.predictions(source)

"""Whether a registered model's challenger becomes its champion, decided on validation images that both saw.

The first champion must be surely better than always naming the largest class: the lower bound of Wilson's
95 % interval of its accuracy lies above that class's share. Later challengers are promoted when they are
*not worse*. That takes all three:

1. Accuracy is not lower by the margin (default 0.01): the lower bound of Tango's 90 % interval of the
   difference, which is a one-sided 95 % bound, lies above -margin. Too few images fail this.
2. It is not lower at all beyond chance: the challenger has no less right, or McNemar's p is at least 0.05.
   Otherwise small losses within the margin would add up over promotions.
3. Log loss is not higher beyond chance: the 95 % interval of the paired difference reaches 0 or below.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serve.contract.errors import UserError
from serve.contract.files import file_sha256
from train.checkpoint import best_checkpoint, load_checkpoint
from train.evaluation.predictions import Predictions, read_predictions
from train.evaluation.significance import CONFIDENCE, PairedTest, accuracy_interval, paired_interval
from train.runs.results import RunResult, check_metrics, paired
from train.tracking.registry import ModelVersion, fetch_run_file, move_alias, read_aliases, read_version
from train.tracking.run_record import read_record

CHAMPION, CHALLENGER = "champion", "challenger"


@dataclass(frozen=True)
class Decision:
    promote: bool
    reasons: list[str]
    """One line for each condition, with its figures."""


def decide(test: PairedTest, margin: float) -> Decision:
    """`test` is of the challenger against the champion. A value that is not a number never promotes."""
    alpha = 1 - CONFIDENCE
    bound = paired_interval(test.gained, test.lost, test.num_images, 1 - 2 * alpha).low
    conditions = [
        (
            bound > -margin,
            f"accuracy {test.accuracy.value:+.4f}, lower bound (one-sided 95 %) {bound:+.4f}, "
            f"must be above {-margin:+.4f}",
        ),
        (
            test.gained >= test.lost or test.p >= alpha,
            f"right only now {test.gained}, wrong only now {test.lost}, McNemar p {test.p:.3g}, "
            f"must be at least {alpha:.2f} if accuracy is lower",
        ),
        (
            test.log_loss.low <= 0,
            f"log loss {test.log_loss.value:+.4f} [{test.log_loss.low:+.4f}, {test.log_loss.high:+.4f}], "
            "the interval must reach 0 or below",
        ),
    ]
    reasons = [f"{'holds' if holds else 'FAILS'}: {text}" for holds, text in conditions]
    if not conditions[0][0] and test.gained >= test.lost:
        reasons.append(
            f"{test.num_images} shared images cannot rule out a loss of {margin:g}: validate on more "
            "images or accept a wider --margin"
        )
    return Decision(all(holds for holds, _ in conditions), reasons)


def decide_first(predictions: Predictions) -> Decision:
    """Of a challenger where there is no champion to compare it with."""
    largest = np.bincount(predictions.labels).max() / len(predictions.labels)
    accuracy = accuracy_interval(predictions.correct)
    holds = accuracy.low > largest
    reasons = [
        f"{'holds' if holds else 'FAILS'}: accuracy {accuracy.value:.4f}, lower bound (95 %) "
        f"{accuracy.low:.4f}, must be above {largest:.4f}, which always naming the largest class gives"
    ]
    if not holds:
        best = accuracy_interval(np.ones(len(predictions.labels), bool)).low
        way_out = "train it longer, or validate on more images"
        if best <= largest:
            way_out = f"no model could show it on {len(predictions.labels)} images: validate on more"
        reasons.append(f"{way_out}; if accuracy is not what counts, move the alias {CHAMPION} in MLflow")
    return Decision(holds, reasons)


def promote(model: str, runs: list[RunResult], margin: float) -> bool:
    """Print the decision, and move the alias when it is to promote; True when champion is challenger.

    Raises:
        UserError: no such model or challenger, predictions that are not of the registered version, no
            shared images, MLflow does not answer, or another promotion moved an alias meanwhile.
    """
    if not 0 < margin < 1:
        raise UserError(f"--margin {margin} is outside 0..1: it is a difference of accuracy")
    records = [read_record(run.folder / "tracking.json") for run in runs]
    if stores := [record.uri for record in records if record is not None and record.uri]:
        os.environ.setdefault("MLFLOW_TRACKING_URI", stores[0])
    aliases = read_aliases(model)
    if CHALLENGER not in aliases:
        raise UserError(
            f"{model} has no version with the alias {CHALLENGER}: make one with "
            f"export/main.py --run RUN --register {model}"
        )
    challenger = read_version(model, aliases[CHALLENGER])
    found = {run_id_of(run): run for run in runs}
    if challenger.run_id not in found:
        raise UserError(
            f"the {CHALLENGER}, {model} version {challenger.version}, is of run "
            f"{challenger.metadata.run_name} ({challenger.run_id}), which is not among those given"
        )
    if aliases.get(CHAMPION) == challenger.version:
        print(f"{model} version {challenger.version} is {CHAMPION} already")
        return True
    new = predictions_of(challenger, found)
    if CHAMPION in aliases:
        champion = read_version(model, aliases[CHAMPION])
        test = paired(new, predictions_of(champion, found))
        if test is None:
            raise UserError(
                f"{CHALLENGER} and {CHAMPION} of {model} share no validation image: train one of them with "
                f"the other's --val-data, or move the alias {CHAMPION} in MLflow if they need no comparison"
            )
        decision = decide(test, margin)
        print(
            f"{model}: {CHALLENGER} {challenger.metadata.run_name} (version {challenger.version}) against "
            f"{CHAMPION} {champion.metadata.run_name} (version {champion.version}), "
            f"{test.num_images} shared validation images"
        )
    else:
        decision = decide_first(new)
        print(
            f"{model} has no {CHAMPION} yet: {CHALLENGER} {challenger.metadata.run_name} (version "
            f"{challenger.version}) on its {len(new.labels)} validation images"
        )
    for reason in decision.reasons:
        print(f"  {reason}")
    if decision.promote:
        move_alias(model, CHAMPION, challenger.version, aliases)
    verdict = f"is {CHAMPION} now" if decision.promote else "is NOT promoted"
    print(f"{model} version {challenger.version} {verdict}")
    return decision.promote


def run_id_of(run: RunResult) -> str:
    """The MLflow run's ID, from the run's record, or from the best checkpoint where there is none."""
    record = read_record(run.folder / "tracking.json")
    run_id: str = load_checkpoint(best_checkpoint(run.folder))["run_id"]
    return record.run_id if record is not None and record.run_id else run_id


def predictions_of(version: ModelVersion, found: dict[str, RunResult]) -> Predictions:
    """From the run directory if it is among those given, else from what its MLflow run logged."""
    if version.run_id in found:
        run = found[version.run_id]
        checkpoint = best_checkpoint(run.folder)
        if file_sha256(checkpoint) != version.metadata.checkpoint_sha256:
            raise UserError(
                f"version {version.version} is not an export of {checkpoint}, which is newer or was not "
                "what was exported: export and register it again"
            )
        return run.predictions
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = fetch_run_file(version.run_id, "val_predictions.csv", Path(folder))
        except ValueError as error:
            raise UserError(
                f"version {version.version} is of run {version.metadata.run_name} ({version.run_id}), "
                f"whose val_predictions.csv is not in MLflow ({error}): give its run directory too"
            ) from error
        predictions = read_predictions(path)
    said = version.metadata
    check_metrics(
        predictions, said.metrics, said.temperature, said.clip_probabilities, f"version {version.version}"
    )
    return predictions

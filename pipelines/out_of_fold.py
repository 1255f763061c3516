"""Join the validation predictions of K runs, of which each saw the data without its own fold."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError
from train.checkpoint import best_checkpoint, load_checkpoint
from train.evaluation.predictions import Predictions, read_predictions


@dataclass(frozen=True)
class OutOfFold:
    """Of each image the prediction of the run that did not train on it; arrays are [N]."""

    root: Path
    paths: list[str]
    """Relative to root (a manifest may name absolute ones)."""
    labels: NDArray[np.int64]
    """The given ones, as indices of class_names."""
    probabilities: NDArray[np.float64]
    """[N, num_classes]"""
    folds: NDArray[np.int64]
    """From 1."""
    class_names: tuple[str, ...]
    num_folds: int

    @property
    def missing(self) -> list[int]:
        """Folds without a run."""
        return sorted(set(range(1, self.num_folds + 1)) - set(self.folds.tolist()))

    @property
    def accuracy(self) -> float:
        return float((self.probabilities.argmax(axis=1) == self.labels).mean())


def read_folds(runs: Sequence[Path]) -> OutOfFold:
    """
    Raises:
        UserError: these are no folds of one data set, or an image is in two; the message names them.
    """
    parts = [_read_fold(run) for run in runs]
    first, reference = runs[0], parts[0][1]
    taken: dict[int, Path] = {}
    for run, (_, state) in zip(runs, parts, strict=True):
        for name, here, there in (
            ("--folds", state["config"]["folds"], reference["config"]["folds"]),
            ("--seed", state["config"]["seed"], reference["config"]["seed"]),
            ("data (digest)", state["content_digest"][:12], reference["content_digest"][:12]),
            ("class names", state["class_names"], reference["class_names"]),
        ):
            if here != there:
                raise UserError(
                    f"{run} and {first} are not folds of one data set: {name} {here!r} and {there!r}"
                )
        fold = state["config"]["fold"]
        if fold in taken:
            raise UserError(f"{taken[fold]} and {run} are both fold {fold}")
        taken[fold] = run
    where: dict[str, Path] = {}
    for run, (predictions, _) in zip(runs, parts, strict=True):
        for path in predictions.paths:
            if path in where:
                raise UserError(f"{path!r} is in both {where[path]} and {run}: they are no folds")
            where[path] = run
    tables = [predictions for predictions, _ in parts]
    sizes = [len(table.paths) for table in tables]
    return OutOfFold(
        Path(reference["val_root"]),
        [path for table in tables for path in table.paths],
        np.concatenate([table.labels for table in tables]),
        np.concatenate([table.probabilities for table in tables]),
        np.repeat([state["config"]["fold"] for _, state in parts], sizes),
        tables[0].class_names,
        reference["config"]["folds"],
    )


def _read_fold(run: Path) -> tuple[Predictions, dict[str, Any]]:
    state = load_checkpoint(best_checkpoint(run))
    if not state["config"].get("folds"):
        raise UserError(f"{run} is no fold: it was trained without --folds")
    predictions = read_predictions(run / "val_predictions.csv")
    if predictions.class_names != tuple(state["class_names"]):
        raise UserError(f"{predictions.source} is not of {best_checkpoint(run)}: other classes")
    return predictions, state

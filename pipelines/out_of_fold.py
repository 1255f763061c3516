"""Validation predictions of K runs, each trained without its own fold, joined to those of all images."""

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
    """Predictions of each image by the run that did not train on it; arrays are [N]."""

    root: Path
    paths: list[str]
    """Relative to root, or absolute."""
    labels: NDArray[np.int64]
    """Given labels as indices of class_names."""
    probabilities: NDArray[np.float64]
    """[N, num_classes]"""
    folds: NDArray[np.int64]
    """Numbers of the folds, from 1."""
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
    """Join the predictions of runs.

    Raises:
        UserError: these are no folds of one data set, or an image is in two; the message names them.
    """
    parts = [_read_fold(run) for run in runs]
    first, reference = runs[0], parts[0][1]
    run_of_fold: dict[int, Path] = {}
    run_of_image: dict[str, Path] = {}
    for run, (predictions, state) in zip(runs, parts, strict=True):
        for name, own, other in (
            ("--folds", state["config"]["folds"], reference["config"]["folds"]),
            ("--seed", state["config"]["seed"], reference["config"]["seed"]),
            ("data (digest)", state["content_digest"][:12], reference["content_digest"][:12]),
            ("class names", state["class_names"], reference["class_names"]),
        ):
            if own != other:
                raise UserError(
                    f"{run} and {first} are not folds of one data set: {name} {own!r} and {other!r}"
                )
        fold = state["config"]["fold"]
        if fold in run_of_fold:
            raise UserError(f"{run_of_fold[fold]} and {run} are both fold {fold}")
        run_of_fold[fold] = run
        for path in predictions.paths:
            if path in run_of_image:
                raise UserError(f"{path!r} is in both {run_of_image[path]} and {run}: they are no folds")
            run_of_image[path] = run
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

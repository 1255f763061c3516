"""Soft labels: probabilities of classes in the columns probability_CLASS of a label file."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError
from serve.contract.tables import TableRow
from train.data.labels import LabelledPaths, RowsError, normal

SOFT_COLUMN = "probability_"
PREDICTIONS = (
    {"path", "label", "probability", "error"},
    {"path", "label", "prediction", "correct", "loss"},
)
"""Columns of the tables of predictions that serve/main.py and a training run write."""
ROUNDING = 1e-3  # most by which another class may be likelier than the label


def read_probabilities(source: Path, row: TableRow, columns: Mapping[str, int]) -> dict[str, float]:
    """Return class -> probability; empty if the cells are. `columns`: class -> column.

    Raises UserError when a cell is no number.
    """
    if not columns:
        return {}
    cells = {name: row.cells[i] for name, i in columns.items()}
    try:
        return {name: float(cell) for name, cell in cells.items()} if any(cells.values()) else {}
    except ValueError as error:
        raise UserError(f"{source} line {row.line}: not a probability: {error}") from error


def describe_soft_labels(
    source: Path,
    columns: Collection[str],
    labels: Mapping[str, str],
    probabilities: Mapping[str, Mapping[str, float]],
) -> tuple[list[str], list[str]]:
    """Return (facts, warnings) about images that train towards probabilities.

    Raises RowsError when labels contradict them in a table of predictions: they were corrected, or the
    model that wrote it was wrong.
    """
    soft = {path: probabilities[path] for path in labels if path in probabilities}
    if not soft:
        return [], []
    facts = [f"soft labels: {len(soft)} images train towards their {SOFT_COLUMN}CLASS columns"]
    others = [  # without labels that have no column, which soft_targets refuses
        path
        for path, classes in soft.items()
        if max(classes.values()) > classes.get(normal(labels[path]), 1) + ROUNDING
    ]
    if not others:
        return facts, []
    line = (
        f"the labels of {len(others)} images, as {labels[others[0]]!r} of {others[0]!r}, are not the "
        f"likeliest class of their {SOFT_COLUMN}CLASS columns, which are what is trained: remove the "
        "columns, or empty their cells in the rows whose label was corrected"
    )
    if any(names.issubset(columns) for names in PREDICTIONS):
        raise RowsError(f"{source}: {line}")
    return facts, [line]


def soft_targets(
    paths: Sequence[str], found: LabelledPaths, class_names: tuple[str, ...], source: str
) -> NDArray[np.float32] | None:
    """Return probabilities [N, num_classes] in the order of `paths`, or None if no image has any.

    An image without probabilities has its label with certainty. Raises UserError when the columns are not
    of these classes, or a row is no distribution.
    """
    if not found.probabilities:
        return None
    targets = np.zeros((len(paths), len(class_names)), np.float32)
    for i, path in enumerate(paths):
        soft = found.probabilities.get(path)
        if soft is None:
            targets[i, class_names.index(found.labels[path])] = 1
            continue
        if set(soft) != set(class_names):
            raise UserError(
                f"{source} has columns {SOFT_COLUMN}CLASS for {sorted(soft)}, and its labels are "
                f"{sorted(class_names)}: give each class one column"
            )
        targets[i] = [soft[name] for name in class_names]
        if not (targets[i] >= 0).all() or abs(targets[i].sum() - 1) > 0.01:
            raise UserError(
                f"{source}: the probabilities of {path!r}, {targets[i].tolist()}, must be from 0 to 1 and "
                "add up to 1"
            )
    return targets

"""Soft labels: probabilities of classes in the columns probability_CLASS of a label file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError
from serve.contract.tables import TableRow
from train.data.labels import LabelledPaths

SOFT_COLUMN = "probability_"


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

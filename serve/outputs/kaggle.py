"""Rows as Kaggle's submissions: columns id (file name without suffix) and label."""

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import IO

from serve.contract.errors import UserError
from serve.inputs.inventory import Entry, Inventory
from serve.outputs.csv_file import CsvLines
from serve.outputs.layout import Format, Layout, Row

NUMBER = re.compile(r"[-+]?\d+(\.\d+)?", re.ASCII)  # as a class's name
HEADER = b"id,label\n"
# Ends in a probability as numpy writes it, which is never 0 or 1 alone, or in nothing. A file of labels has
# the same header, and whole numbers.
PROBABILITY_ROW = re.compile(rb"[^\n]*,(\d\.\d+(e-\d+)?|\d(\.\d+)?e-\d+)?\n?")
ROWS_EXAMINED = 1000
MAX_LINE = 1 << 16  # bytes


class KaggleWriter:
    """label is the probability of the second class (of two numbers: the greater one), or with `labels` the
    likeliest class: its name where the names are numbers, else its position in the model's order, from 0.

    It is empty for an unreadable file: Kaggle refuses that, where a guess would pass unseen.
    """

    def __init__(self, file: IO[bytes], layout: Layout):
        self.labels, self.lines = layout.labels, CsvLines(file)
        self.numbers, self.positive = _numbers(layout.class_names), _positive(layout.class_names)
        self.lines.writerow(["id", "label"])

    def write(self, row: Row) -> None:
        label = ""
        if row.probabilities is not None:
            likeliest = int(row.probabilities.argmax())
            label = self.numbers[likeliest] if self.labels else str(row.probabilities[self.positive])
        self.lines.writerow([PurePosixPath(row.path).stem, label])

    def close(self) -> None:
        self.lines.close()


def _numbers(class_names: Sequence[str]) -> Sequence[str]:
    """Return what stands for the classes in a column of numbers."""
    if all(map(NUMBER.fullmatch, class_names)):
        return class_names
    return [str(position) for position in range(len(class_names))]


def _positive(class_names: Sequence[str]) -> int:
    """Return the position of the class whose probability is written."""
    if all(map(NUMBER.fullmatch, class_names)):  # by name, 1 is before -1
        return max(range(len(class_names)), key=lambda position: float(class_names[position]))
    return 1


def label_meaning(layout: Layout) -> str:
    """Describe in words what the column label holds."""
    names = layout.class_names
    if not layout.labels:
        return f"label is the probability of {names[_positive(names)]!r}"
    pairs = [f"{number} for {name!r}" for number, name in zip(_numbers(names), names, strict=True)]
    return f"label is {', '.join(pairs[:10])}{', ...' if pairs[10:] else ''}"


def check_kaggle(names: Iterable[str], layout: Layout) -> None:
    """Raise UserError when the Kaggle format cannot hold the predictions for these inputs."""
    class_names = layout.class_names
    if len(class_names) != 2 and not layout.labels:
        raise UserError(
            f"--format kaggle writes the second of two classes' probability, and the model has "
            f"{len(class_names)} classes: add --labels or use --format csv"
        )
    numbers = [name for name in class_names if NUMBER.fullmatch(name)]
    others = [name for name in class_names if name not in numbers]
    if layout.labels and numbers and others:
        raise UserError(
            f"--format kaggle --labels writes numbers; {numbers[0]!r} is one and {others[0]!r} is none: "
            "use --format csv"
        )
    # sorted by id; no id has a slash
    ids = Inventory.sort(Entry(f"{PurePosixPath(name).stem}/{name}") for name in names)
    previous = ["", ""]
    for entry in ids.entries():
        id_and_name = entry.name.split("/", 1)
        if id_and_name[0] == previous[0]:
            raise UserError(
                f"--format kaggle: {previous[1]!r} and {id_and_name[1]!r} have the same id "
                f"{previous[0]!r}; rename one or use --format csv"
            )
        previous = id_and_name


def begins_as_kaggle(file: IO[bytes]) -> bool:
    rows = [file.readline(MAX_LINE) for _ in range(ROWS_EXAMINED)]
    return rows[0] == HEADER and all(PROBABILITY_ROW.fullmatch(row) for row in rows[1:] if row)


KAGGLE = Format("kaggle", ".csv", KaggleWriter, begins_as_kaggle)

"""Rows to a file: CSV, JSON Lines, Parquet (the extra parquet), or Kaggle's two columns.

Whatever the format: path; label and probability of the likeliest class; the probabilities of all classes
or, with `top_k`, of the k likeliest; the embedding if asked for; error, which is empty (in JSON and Parquet
null) when there is a prediction.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import IO

from serve.contract.errors import UserError
from serve.inputs.inventory import Entry, Inventory, printable
from serve.outputs.layout import Layout, Row, Writer

FORMATS = ("csv", "jsonl", "parquet", "kaggle")
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?", re.ASCII)  # as a class's name
SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


def format_of(output: str) -> str:
    """The suffix's format; csv without one. Raises UserError when the suffix says none."""
    suffix = os.path.splitext(output)[1].lower()
    if not suffix:
        return "csv"
    if suffix not in SUFFIXES:
        raise UserError(
            f"--output {output!r}: {suffix!r} is none of {', '.join(SUFFIXES)}; add --format, which decides"
        )
    return SUFFIXES[suffix]


def open_writer(format_name: str, file: IO[bytes], layout: Layout) -> Writer:
    if format_name == "kaggle":
        return KaggleWriter(file, layout)
    if format_name == "parquet":
        from serve.outputs.parquet import ParquetWriter

        return ParquetWriter(file, layout)
    if layout.embeddings and format_name == "csv":
        raise UserError("--embeddings needs --format jsonl or parquet: a CSV cell holds no vector")
    return CsvWriter(file, layout) if format_name == "csv" else JsonlWriter(file, layout)


def _text(file: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")


class _UnixLines:
    """Ends the lines of csv.writer with a plain newline.

    Told to do so itself, it would not quote a file name with a carriage return (before Python 3.13), and
    a reader would see two rows.
    """

    def __init__(self, file: IO[bytes]):
        self.text = _text(file)

    def write(self, line: str) -> None:
        self.text.write(line.removesuffix("\r\n") + "\n")

    def close(self) -> None:
        self.text.flush()
        self.text.detach()


class CsvWriter:
    """Columns path, label, probability, then probability_CLASS or label_2, probability_2, ..., error."""

    def __init__(self, file: IO[bytes], layout: Layout):
        self.layout, self.lines = layout, _UnixLines(file)
        self.csv = csv.writer(self.lines, lineterminator="\r\n")
        self.csv.writerow(["path", "label", "probability", *layout.columns, "error"])

    def write(self, row: Row) -> None:
        if row.probabilities is None:
            self.csv.writerow([row.path, "", "", *("" for _ in self.layout.columns), row.error])
            return
        likeliest = self.layout.likeliest(row.probabilities)
        # str of a float32 is the shortest text that reads back as the same number
        ranked = [(self.layout.class_names[i], str(row.probabilities[i])) for i in likeliest]
        others = [cell for pair in ranked[1:] for cell in pair]
        values = others if self.layout.top_k else [str(p) for p in row.probabilities]
        self.csv.writerow([row.path, *ranked[0], *values, ""])

    def close(self) -> None:
        self.lines.close()


class JsonlWriter:
    """An object on each line: path, label, probability, probabilities {class: p} or top [{label,
    probability}], embedding, error."""

    def __init__(self, file: IO[bytes], layout: Layout):
        self.layout, self.file = layout, file
        self.names = [json.dumps(printable(name)) for name in layout.class_names]

    def write(self, row: Row) -> None:
        likeliest = [] if row.probabilities is None else self.layout.likeliest(row.probabilities)
        field = "top" if self.layout.top_k else "probabilities"
        cells = {"path": json.dumps(printable(row.path)), "label": "null", "probability": "null"}
        cells[field] = "null"
        if row.probabilities is not None:
            values = [str(p) for p in row.probabilities]  # of a float32, the shortest; valid JSON
            cells |= {"label": self.names[likeliest[0]], "probability": values[likeliest[0]]}
            if self.layout.top_k:
                pairs = (f'{{"label":{self.names[i]},"probability":{values[i]}}}' for i in likeliest)
                cells[field] = f"[{','.join(pairs)}]"
            else:
                pairs = (f"{name}:{value}" for name, value in zip(self.names, values, strict=True))
                cells[field] = f"{{{','.join(pairs)}}}"
        if self.layout.embeddings:
            vector = row.embedding
            cells["embedding"] = "null" if vector is None else f"[{','.join(str(x) for x in vector)}]"
        cells["error"] = json.dumps(printable(row.error)) if row.error else "null"
        line = ",".join(f'"{key}":{value}' for key, value in cells.items())
        self.file.write(f"{{{line}}}\n".encode())

    def close(self) -> None:
        pass


class KaggleWriter:
    """Columns id (file name without suffix) and label.

    label is the probability of the second class (of two numbers: the greater one), or with `labels` the
    likeliest class: its name where the names are numbers, else its place in the model's order, from 0.
    It is empty for an unreadable file: Kaggle refuses that, where a guess would pass unseen.
    """

    def __init__(self, file: IO[bytes], layout: Layout):
        self.labels, self.lines = layout.labels, _UnixLines(file)
        self.numbers, self.positive = _numbers(layout.class_names), _positive(layout.class_names)
        self.csv = csv.writer(self.lines, lineterminator="\r\n")
        self.csv.writerow(["id", "label"])

    def write(self, row: Row) -> None:
        label = ""
        if row.probabilities is not None:
            likeliest = int(row.probabilities.argmax())
            label = self.numbers[likeliest] if self.labels else str(row.probabilities[self.positive])
        self.csv.writerow([PurePosixPath(row.path).stem, label])

    def close(self) -> None:
        self.lines.close()


def _numbers(class_names: Sequence[str]) -> Sequence[str]:
    """What stands for the classes in a column of numbers."""
    if all(map(NUMBER.fullmatch, class_names)):
        return class_names
    return [str(place) for place in range(len(class_names))]


def _positive(class_names: Sequence[str]) -> int:
    """The place of the class whose probability is asked for."""
    if all(map(NUMBER.fullmatch, class_names)):  # by name, 1 is before -1
        return max(range(len(class_names)), key=lambda place: float(class_names[place]))
    return 1


def kaggle_meaning(layout: Layout) -> str:
    """What the column label holds, in words."""
    names = layout.class_names
    if not layout.labels:
        return f"label is the probability of {names[_positive(names)]!r}"
    pairs = [f"{number} for {name!r}" for number, name in zip(_numbers(names), names, strict=True)]
    return f"label is {', '.join(pairs[:10])}{', ...' if pairs[10:] else ''}"


def check_kaggle(names: Iterable[str], class_names: Sequence[str], labels: bool) -> None:
    """Raises UserError when the Kaggle format cannot hold the answers."""
    if len(class_names) != 2 and not labels:
        raise UserError(
            f"--format kaggle writes the second of two classes' probability, and the model has "
            f"{len(class_names)} classes: add --labels or use --format csv"
        )
    numbers = [name for name in class_names if NUMBER.fullmatch(name)]
    others = [name for name in class_names if name not in numbers]
    if labels and numbers and others:
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

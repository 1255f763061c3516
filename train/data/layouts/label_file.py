"""Layout "csv": a label file, which names images and labels in its columns path and label.

Columns probability_CLASS, one for each class, are soft labels.
"""

import csv
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.contract.archive import SUFFIX
from serve.contract.errors import UserError
from serve.contract.files import atomic_write
from serve.contract.listing import has_image_suffix
from train.data.labels import LabelledPaths, check_none_missing, missing, normal
from train.data.layouts.label_file_advice import cure_for_columns, cure_for_encoding, cure_for_paths
from train.data.text_encoding import is_undecoded, text_encoding

SOFT_COLUMN = "probability_"
FIRST_FILES = 10  # if none of them exists, their paths are written otherwise than the files' names


def matches(source: Path) -> bool:
    return source.is_file() and source.suffix != SUFFIX


def read(source: Path, flag: str = "--data") -> LabelledPaths:
    """Return the images and labels of a label file; a row that repeats another one counts once.

    A label such as None is a class if it is in double quotes, as `write_label_file` writes all: missing
    values are written without.

    Raises:
        UserError: a column, path or label is missing, an image has two labels, or a label stands for none
            or is not UTF-8; the message names the line and the cure.
    """
    labels: dict[str, str] = {}
    probabilities: dict[str, dict[str, float]] = {}
    lines: dict[str, int] = {}  # label -> the first line that has it
    quoted: set[str] = set()
    repeated = 0
    written: dict[str, str] = {}  # file -> its path as it is written first: ./a.jpg and a.jpg are one
    folder = os.path.realpath(source.parent)
    with _open_table(source) as (columns, rows):
        _check_columns(source, columns, rows)
        soft_columns = {
            normal(column.removeprefix(SOFT_COLUMN)): column
            for column in columns
            if column.startswith(SOFT_COLUMN)
        }
        for row in rows:
            path, label = row.cells["path"], row.cells["label"]
            if not path or not label.strip():
                raise UserError(f"{source} line {row.line}: path or label is empty")
            if has_image_suffix(label):
                raise UserError(
                    f"{source} line {row.line}: the label {label!r} is an image's name; write a path that "
                    "holds a comma in double quotes, and the label in the column label"
                )
            whole = os.path.join(folder, path)
            # through a linked folder, a/../b is not b
            file = os.path.realpath(whole) if ".." in path else os.path.normpath(whole)
            image = written.setdefault(file, path)
            soft = _probabilities(source, row, soft_columns)
            if image in labels:
                first = labels[image], probabilities.get(image, {})
                if (normal(first[0]), first[1]) != (normal(label), soft):
                    raise UserError(
                        f"{source} line {row.line}: {image!r} is listed twice, as {first[0]!r} "
                        f"{first[1] or ''} and as {label!r} {soft or ''}: keep one of the two rows"
                    )
                repeated += 1
                continue
            labels[image] = label
            if soft:
                probabilities[image] = soft
            if label not in lines and f'"{label}"' in row.text:
                quoted.add(label)
            lines.setdefault(label, row.line)
    _check_labels(source, lines, labels, quoted)
    if cure := cure_for_paths(source, columns, list(islice(labels, FIRST_FILES))):
        raise UserError(f"{source}: {cure}")
    facts = ["labels from a label file (CSV)"]
    facts += [f"{name!r}, in quotes, is a class" for name in sorted(missing(lines))]
    facts += [f"{repeated} rows repeat an earlier one and count once"] if repeated else []
    return LabelledPaths(source.parent, labels, "; ".join(facts), [], probabilities)


class LabelRow(NamedTuple):
    line: int
    """Number of its last line in the file."""
    text: str
    """As it is in the file; cells have lost their quotes."""
    cells: dict[str, str]


@contextmanager
def _open_table(path: Path) -> Iterator[tuple[list[str], Iterator[LabelRow]]]:
    """Open a CSV file in UTF-8 or UTF-16, yield (columns, rows); path, label and split may be in capitals.

    Raises OSError, csv.Error or UnicodeDecodeError when it cannot be read.
    """
    with path.open("rb") as binary:
        encoding = text_encoding(binary.read(4))
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    with path.open(newline="", encoding=encoding, errors=errors) as file:
        read: list[str] = []

        def remembered() -> Iterator[str]:
            for text in file:
                read.append(text)
                yield text

        # strict: else a quote that is left open takes all that follows
        reader = csv.reader(remembered(), strict=True, skipinitialspace=True)
        header = [name.strip() for name in next(reader, [])]
        columns = [n.casefold() if n.casefold() in ("path", "label", "split") else n for n in header]

        def rows() -> Iterator[LabelRow]:
            read.clear()
            for cells in reader:
                text = "".join(read)
                read.clear()
                if any(cells[len(columns) :]):
                    raise UserError(
                        f"{path} line {reader.line_num} has {len(cells)} cells for {len(columns)} columns: "
                        "write what holds a comma in double quotes"
                    )
                if [cell.strip(" \ufeff") for cell in cells] == header:
                    raise UserError(
                        f"{path} line {reader.line_num} repeats the first line, {text.strip()!r}: remove it"
                    )
                if "\0" in text:
                    raise UserError(
                        f"{path} line {reader.line_num} holds a NUL character: {text.strip()!r}"
                    )
                if any(cells):
                    padded = [*cells, *("" for _ in columns)]
                    yield LabelRow(reader.line_num, text, dict(zip(columns, padded, strict=False)))

        yield columns, rows()


def _check_columns(path: Path, columns: list[str], rows: Iterator[LabelRow]) -> None:
    if not {"path", "label"} <= set(columns):
        described = ", ".join(map(repr, columns))[:200] or "nothing in it"
        first: list[str] = []
        with suppress(ValueError, StopIteration):
            first = list(next(rows).cells.values())
        raise UserError(
            f"{path} is read as a label file: UTF-8, separated by commas, with the columns path,label in "
            f"its first line; it has {described}{cure_for_columns(path, columns, first)}"
        )
    if twice := [name for name in ("path", "label") if columns.count(name) > 1]:
        raise UserError(f"{path} has the column {twice[0]} twice: remove one of them")
    if "split" in columns:
        raise UserError(
            f"{path} has a column split, which has no effect: make it two label files, one for --data and "
            "one for --val-data, without this column"
        )


def _probabilities(path: Path, row: LabelRow, columns: Mapping[str, str]) -> dict[str, float]:
    """Return class -> probability; empty if the cells are. `columns`: class -> column."""
    cells = {name: row.cells[column] for name, column in columns.items()}
    try:
        return {name: float(cell) for name, cell in cells.items()} if any(cells.values()) else {}
    except ValueError as error:
        raise UserError(f"{path} line {row.line}: not a probability: {error}") from error


def _check_labels(
    path: Path, lines: Mapping[str, int], labels: Mapping[str, str], quoted: Collection[str]
) -> None:
    """Check the distinct labels; `lines`: label -> the first line that has it."""
    if odd := [label for label in lines if is_undecoded(label)]:
        cure = cure_for_encoding(path, [os.fsencode(label) for label in odd])
        raise UserError(f"{path} line {lines[odd[0]]}: the label is not UTF-8; {cure}")
    if absent := missing(lines).difference(quoted):
        where = f"{path} line {min(lines[name] for name in absent)}"
        check_none_missing(Counter(labels.values()), where, "write it in double quotes", quoted)


def read_excluded(path: str) -> list[str]:
    """Return the column path of a CSV file, in order, without repetition; [] if `path` is empty.

    Raises UserError when the file cannot be read, or has no such column.
    """
    if not path:
        return []
    try:
        with _open_table(Path(path)) as (columns, rows):
            if "path" not in columns:
                raise UserError(f"--exclude {path} needs the column path; it has {columns}")
            return list(dict.fromkeys(row.cells["path"] for row in rows))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"--exclude {path} cannot be read: {error}") from error


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
                f"{source} has the columns {SOFT_COLUMN}CLASS for {sorted(soft)}, its labels are "
                f"{sorted(class_names)}"
            )
        targets[i] = [soft[name] for name in class_names]
        if not (targets[i] >= 0).all() or abs(targets[i].sum() - 1) > 0.01:
            raise UserError(
                f"{source}: the probabilities of {path!r}, {targets[i].tolist()}, do not sum to 1"
            )
    return targets


def write_label_file(
    path: Path,
    images: Sequence[str],
    labels: Sequence[str],
    soft: Mapping[str, NDArray[np.float64]] | None = None,
    class_names: Sequence[str] = (),
) -> None:
    """Write atomically; `soft` has the probabilities [num_classes] of some of the images."""
    soft = soft or {}
    columns = [SOFT_COLUMN + name for name in class_names] if soft else []
    with atomic_write(path, "w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(["path", "label", *columns])
        for image, label in zip(images, labels, strict=True):
            cells = [float(p) for p in soft[image]] if image in soft else ["" for _ in columns]
            writer.writerow([image, label, *cells])

"""Layout "csv": a label file, a table whose columns name images and their labels.

Which columns these are is inferred and checked (image_files.py in serve/contract, label_columns.py).
Columns probability_CLASS, one for each class, are soft labels.
"""

import csv
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.contract.archive import SUFFIX
from serve.contract.errors import UserError
from serve.contract.files import atomic_write
from serve.contract.image_files import HALF, ImageFiles, Naming, part_of
from serve.contract.listing import has_image_suffix
from serve.contract.tables import TableRow, read_table
from serve.contract.text_encoding import is_undecoded, likely_encodings, reads_as
from serve.contract.urls import redact
from train.data.labels import LabelledPaths, RowsError, check_none_missing, listed, missing, normal
from train.data.layouts.label_candidates import (
    SHOWN,
    check_labels_are_classes,
    classes_of,
    column_flag,
    find_split_column,
    part_of_cell,
    warn_of_groups,
)
from train.data.layouts.label_columns import (
    LabelColumns,
    choose_columns,
    describe_columns,
    describe_lost,
)
from train.data.layouts.label_names import read_class_names
from train.data.layouts.soft_labels import SOFT_COLUMN, describe_soft_labels, read_probabilities

SEVERAL = re.compile(r"""[\[{]\s*(['"\d-].*)?[\]}]""")  # ["a", "b"], ['a'], [0, 3], {"a": 1}, []


@dataclass
class Rows:
    """Images and labels, as they are collected from rows."""

    labels: dict[str, str] = field(default_factory=dict)
    probabilities: dict[str, dict[str, float]] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    """Label -> the first line that has it."""
    quoted: set[str] = field(default_factory=set)
    """Labels in double quotes."""
    repeated: int = 0


def matches(source: Path) -> bool:
    return source.is_file() and source.suffix != SUFFIX


def read(source: Path, flag: str = "--data", columns: str = "") -> LabelledPaths:
    """Return the images and labels of a label file; a row that repeats another one counts once.

    `columns` names the column of the images and, after a comma, that of the labels, or those of the classes
    one by one; empty: they are inferred. A label such as None is a class if it is in double quotes, as
    `write_label_file` writes all: missing values are written without.

    Raises:
        UserError: a column, path or label is missing or ambiguous, an image has two labels, or a label
            stands for none or is not UTF-8; the message names the line and the cure. RowsError where only
            rows are wrong.
    """
    files = ImageFiles(str(source), "train" if flag == "--data" else "val")
    with source.open("rb") as file:
        table = read_table(file, str(source))
        if not table.columns:
            raise UserError(f"{source} is read as a label file (path,label), and is empty")
        table, rows, chosen = choose_columns(source, table, files, columns)
    values = [value for value in dict.fromkeys(row.cells[chosen.image] for row in rows) if value.strip()]
    naming, found = files.locate(values)
    try:
        chosen = replace(chosen, split=find_split_column(str(source), table.columns, rows, chosen.used))
        collected = _collect(source, table.columns, rows, chosen, files, naming)
        _check_labels(source, collected)
    except UserError as error:
        if found < max(1, HALF * len(values)):
            raise
        raise RowsError(str(error)) from error
    if found < HALF * len(values):
        raise UserError(f"{source}: {_not_found(source, values, files, naming)}")
    if len(chosen.labels) == 1:
        check_labels_are_classes(str(source), table.columns[chosen.labels[0]], collected.lines)
    names, names_file = read_class_names(source, collected.lines.keys(), exactly=flag == "--data")
    labels = collected.labels
    if names:
        labels = {path: names[label.strip()] for path, label in labels.items()}
    facts = ["labels from a label file (CSV)", *table.facts()]
    facts += describe_columns(table.columns, chosen, naming)
    facts += [f"names of the classes from {names_file}"] if names else []
    facts += [f"{name!r}, in quotes, is a class" for name in sorted(missing(collected.lines))]
    facts += (
        [f"{collected.repeated} rows repeat an earlier one and count once"] if collected.repeated else []
    )
    warnings = _combined(labels.values()) if len(chosen.labels) == 1 else []
    kinds = {part_of(path.rpartition("/")[0]) for path in labels} - {""}
    if "train" in kinds and len(kinds) > 1 and not collected.parts:
        warnings.append(
            f"images of the parts {listed(sorted(kinds))} are one data set; a column split keeps them apart"
        )
    labels, validation, lines = _parts(labels, collected.parts, flag)
    if flag == "--data":  # images of --val-data are not split, and compare with their labels
        soft, doubts = describe_soft_labels(source, table.columns, labels, collected.probabilities)
        lines, warnings = lines + soft, warnings + doubts
        if chosen.split is None:
            warnings += warn_of_groups(table.columns, rows, chosen.used, len(labels))
    return LabelledPaths(
        source.parent,
        labels,
        "; ".join(facts + lines),
        warnings,
        probabilities=collected.probabilities,
        validation=validation,
    )


def _combined(labels: Iterable[str]) -> list[str]:
    """Return a warning about labels that are several others (rust scab; Edema|Mass), if there are some."""
    names = set(map(str.strip, labels))

    def is_combined(name: str) -> bool:
        pieces, words = [piece.strip() for piece in re.split(r"[|;,]", name)], name.split(" ")
        marked = len(pieces) > 1 and not names.isdisjoint(pieces)
        return marked or (len(words) > 1 and names.issuperset(words))

    several = [name for name in names if is_combined(name)]
    line = f"combinations of labels, as {{!r}}, are classes of their own ({len(several)})"
    return [line.format(min(several))] if several else []


def _collect(
    source: Path,
    columns: list[str],
    rows: list[TableRow],
    chosen: LabelColumns,
    files: ImageFiles,
    naming: Naming,
) -> Rows:
    """Return the images and labels of all rows. Raises UserError for a row that is wrong."""
    found = Rows()
    written: dict[str, str] = {}  # file -> its path as it is written first: ./a.jpg and a.jpg are one
    folder = os.path.realpath(source.parent)
    for row in rows:
        value, label = row.cells[chosen.image], _label(source, columns, row, chosen)
        if not value.strip() or not label.strip():
            raise UserError(
                f"{source} line {row.line}: path or label is empty: label the image, or remove the row"
            )
        if label not in found.lines and SEVERAL.fullmatch(label):
            raise UserError(
                f"{source} line {row.line}: {label!r} is a list, as of several labels, and each image "
                "needs exactly one: write its class alone, or remove the row"
            )
        if label not in found.lines and has_image_suffix(label):
            raise UserError(
                f"{source} line {row.line}: the label {label!r} is an image's name; write a path that "
                "holds a comma in double quotes, and the label in the column label"
            )
        path = files.path_of(value, naming)
        whole = os.path.join(folder, path)
        # through a linked folder, a/../b is not b
        file = os.path.realpath(whole) if ".." in path else os.path.normpath(whole)
        image = written.setdefault(file, path)
        soft = read_probabilities(source, row, chosen.soft)
        part = (
            part_of_cell(columns[chosen.split], row.cells[chosen.split]) if chosen.split is not None else ""
        )
        if image in found.labels:
            first = found.labels[image], found.probabilities.get(image, {}), found.parts.get(image, "")
            if (normal(first[0]), *first[1:]) != (normal(label), soft, part):
                one, other = (f"{a!r} {b or ''} {c}".strip() for a, b, c in (first, (label, soft, part)))
                raise UserError(
                    f"{source} line {row.line}: {image!r} is listed twice, as {one} and as {other}: keep "
                    "one of the two rows"
                )
            found.repeated += 1
            continue
        found.labels[image] = label
        if soft:
            found.probabilities[image] = soft
        if part:
            found.parts[image] = part
        if len(chosen.labels) > 1 or (label not in found.lines and f'"{label}"' in row.text):
            found.quoted.add(label)
        found.lines.setdefault(label, row.line)
    return found


def _label(source: Path, columns: list[str], row: TableRow, chosen: LabelColumns) -> str:
    if len(chosen.labels) == 1:
        return row.cells[chosen.labels[0]]
    classes = classes_of(row, chosen.labels)
    if len(classes) != 1:
        named = f"the classes {listed([columns[i] for i in classes], SHOWN)}" if classes else "no class"
        flag = column_flag(columns[chosen.image], columns[chosen.labels[0]])
        raise UserError(
            f"{source} line {row.line} has {named}, and each image needs exactly one: remove such rows, or "
            f"train for one of the columns, as with {flag}"
        )
    return columns[classes[0]]


def _check_labels(source: Path, found: Rows) -> None:
    """Raise UserError when a label is not UTF-8 or stands for none."""
    if odd := [label for label in found.lines if is_undecoded(label)]:
        cure = _cure_for_encoding(source, [os.fsencode(label) for label in odd])
        raise UserError(f"{source} line {found.lines[odd[0]]}: the label is not UTF-8; {cure}")
    if absent := missing(found.lines).difference(found.quoted):
        where = f"{source} line {min(found.lines[name] for name in absent)}"
        check_none_missing(Counter(found.labels.values()), where, "write it in double quotes", found.quoted)


def _cure_for_encoding(source: Path, texts: list[bytes]) -> str:
    """Return the cure for a file with these texts, which are not UTF-8."""
    likely = likely_encodings(texts)
    if not likely:
        return f"{texts[0]!r} {reads_as(likely)}: save the file as UTF-8"
    file = shlex.quote(str(source))
    new = shlex.quote(str(source.with_name(f"{source.stem}.new{source.suffix}")))
    return f"{texts[0]!r} {reads_as(likely)}; run: iconv -f {next(iter(likely))} -t utf-8 {file} > {new}"


def _not_found(source: Path, values: list[str], files: ImageFiles, naming: Naming) -> str:
    """Return why most of the images are not found, and where they were sought."""
    first = next(value for value in values if not files.find(value, naming))
    if is_undecoded(first):
        return f"there is no image {first!r}; {_cure_for_encoding(source, [os.fsencode(first)])}"
    return f"there is no image {redact(first)!r}; {describe_lost(first, files)}"


def _parts(
    labels: dict[str, str], parts: Mapping[str, str], flag: str
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Return the labels that the flag stands for, those to validate on, and what is left out.

    Rows of val validate, those of test where there are none of val.
    """
    if not parts:
        return labels, {}, []
    counts = Counter(parts.values())
    held_out = "val" if counts["val"] else "test"
    taken = "train" if flag == "--data" else held_out
    chosen = {path: label for path, label in labels.items() if parts[path] == taken}
    validation = {path: label for path, label in labels.items() if parts[path] == held_out}
    used = {taken, held_out} if flag == "--data" else {taken}
    left = [f"{count} images of {part} are left out" for part, count in counts.items() if part not in used]
    return chosen, validation if flag == "--data" else {}, left


def read_excluded(path: str) -> list[str]:
    """Return the column path of a CSV file, in order, without repetition; [] if `path` is empty.

    Raises UserError when the file cannot be read, or has no such column.
    """
    if not path:
        return []
    try:
        with open(path, "rb") as file:
            table = read_table(file, path)
            if not table.find("path"):
                raise UserError(f"--exclude {path} needs the column path; it has {table.columns}")
            return list(dict.fromkeys(row.cells[table.find("path")[0]] for row in table.rows))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"--exclude {path} cannot be read: {error}") from error


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

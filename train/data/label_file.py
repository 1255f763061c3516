"""CSV manifests: path, label, and for soft labels a column probability_CLASS for each class."""

import csv
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError
from serve.contract.files import atomic_write
from serve.contract.listing import has_image_suffix
from train.data.label_file_advice import cure_for_columns, cure_for_encoding, cure_for_paths
from train.data.labels import check_none_missing, check_white_space, missing, normal
from train.data.text_encoding import is_undecoded, text_encoding

SOFT_COLUMN = "probability_"
FIRST_FILES = 10  # if none of them exists, it is not that a file is lost

Rows = Iterator[tuple[int, str, dict[str, str]]]  # line number, the line, cells by column


def read_manifest(path: Path, notes: list[str] | None = None) -> dict[str, str]:
    """image -> label, from the columns path and label. A row that says the same again counts once.

    A label such as None is a class if it is in double quotes, as `write_manifest` writes all: what stands
    for a missing value is written without them.

    Raises:
        UserError: a column, path or label is missing, an image has two labels, a label stands for none or
            is not UTF-8, labels differ by white space alone, or a column `split` would have no effect.
    """
    labels: dict[str, str] = {}
    first_of = _Files(path.parent)
    lines: dict[str, int] = {}  # of each label and image, where it comes first
    quoted: set[str] = set()
    repeated = 0
    with _table(path) as (columns, rows):
        if not {"path", "label"} <= set(columns):
            described = ", ".join(map(repr, columns))[:200] or "nothing in it"
            first: list[str] = []
            with suppress(ValueError, StopIteration):
                first = list(next(rows)[2].values())
            raise UserError(
                f"{path} is read as a manifest: UTF-8, separated by commas, with the columns path,label in "
                f"its first line; it has {described}{cure_for_columns(path, columns, first)}"
            )
        if "split" in columns:
            raise UserError(
                f"{path} has a column split, which is not looked at: make it two manifests, one for --data "
                "and one for --val_data, without this column"
            )
        for line, text, row in rows:
            image, label = first_of[row["path"]], row["label"]
            if not image or not label.strip():
                raise UserError(f"{path} line {line}: path or label is empty")
            if has_image_suffix(label):
                raise UserError(
                    f"{path} line {line}: the label {label!r} is an image's name; write a path that holds "
                    "a comma in double quotes, and the label in the column label"
                )
            if image in labels:
                if normal(labels[image]) != normal(label):
                    raise UserError(
                        f"{path} line {line}: {image!r} is listed twice, as {labels[image]!r} and as "
                        f"{label!r}: keep one of the two rows"
                    )
                repeated += 1
            else:
                labels[image] = label
                if label not in lines and f'"{label}"' in text:
                    quoted.add(label)
                lines.setdefault(label, line)
    if not labels:
        raise UserError(f"{path} lists no images")
    _check_labels(path, lines, labels, quoted)
    if cure := cure_for_paths(path, columns, list(islice(labels, FIRST_FILES))):
        raise UserError(f"{path}: {cure}")
    if notes is not None:
        notes += [f"{name!r}, in quotes, is a class" for name in sorted(missing(lines))]
        notes += [f"{repeated} rows repeat an earlier one and count once"] if repeated else []
    return labels


def _check_labels(
    path: Path, lines: Mapping[str, int], labels: Mapping[str, str], quoted: Collection[str]
) -> None:
    """`lines`: label -> the line in which it comes first."""
    if odd := [label for label in lines if is_undecoded(label)]:
        cure = cure_for_encoding(path, [os.fsencode(label) for label in odd])
        raise UserError(f"{path} line {lines[odd[0]]}: the label is not UTF-8; {cure}")
    if absent := missing(lines).difference(quoted):
        where = f"{path} line {min(lines[name] for name in absent)}"
        check_none_missing(Counter(labels.values()), where, "write it in double quotes", quoted)
    check_white_space(lines, str(path))


class _Files:
    """A file's path as it is written first: ./a.jpg and a.jpg are one."""

    def __init__(self, folder: Path):
        self._folder = os.path.realpath(folder)
        self._first: dict[str, str] = {}

    def __getitem__(self, path: str) -> str:
        whole = os.path.join(self._folder, path)
        # through a linked folder, a/../b is not b
        file = os.path.realpath(whole) if ".." in path else os.path.normpath(whole)
        return self._first.setdefault(file, path) if path else path


@contextmanager
def _table(path: Path) -> Iterator[tuple[list[str], Rows]]:
    """(columns, rows) of a CSV file in UTF-8 or UTF-16. path and label are found in capitals, too.

    Raises:
        UserError: not decodable, a column twice, a row with more cells than columns, or NUL characters.
        OSError, csv.Error: it cannot be read.
    """
    try:
        with path.open("rb") as binary:
            encoding = text_encoding(binary.read(4))
        errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
        with path.open(newline="", encoding=encoding, errors=errors) as file:
            reader = csv.reader(file, strict=True)  # else a quote that is left open takes all that follows
            header = next(reader, [])
            spaced = any(name.startswith(" ") for name in header[1:])  # path, label: so are the rows
            columns = [_column(name.strip(' "') if spaced else name, header) for name in header]
            for name in ("path", "label"):
                if columns.count(name) > 1:
                    raise UserError(f"{path} has the column {name} twice: remove one of them")
            yield columns, _rows(path, header, columns, file, reader.line_num, spaced)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} begins as UTF-16 does, but is none: save it as UTF-8") from error


def _column(name: str, header: Sequence[str]) -> str:
    lowered = name.strip().casefold()
    return lowered if lowered in ("path", "label", "split") and lowered not in header else name.strip()


def _rows(
    path: Path, header: list[str], columns: list[str], file: Iterable[str], before: int, spaced: bool
) -> Rows:
    """`before`: the lines of the header; `spaced`: cells begin with a space."""
    read: list[str] = []

    def remembered() -> Iterator[str]:
        for line in file:
            read.append(line)
            yield line

    reader = csv.reader(remembered(), strict=True, skipinitialspace=spaced)
    for cells in reader:
        text = "".join(read)
        read.clear()
        line = before + reader.line_num
        if not any(cells):
            continue
        if any(cells[len(columns) :]):
            raise UserError(
                f"{path} line {line} has {len(cells)} cells for {len(columns)} columns: write what holds a "
                "comma in double quotes"
            )
        if cells == header:
            raise UserError(f"{path} line {line} repeats the first line: two files were joined; remove it")
        if any("\0" in cell for cell in cells):
            raise UserError(f"{path} line {line} holds a NUL character: it is no text")
        yield line, text, dict(zip(columns, [*cells, *("" for _ in columns)], strict=False))


def read_excluded(path: str) -> list[str]:
    """The column path of a CSV file, in order, without repetition; none if `path` is empty.

    Raises:
        UserError: the file cannot be read, or has no such column.
    """
    if not path:
        return []
    try:
        with _table(Path(path)) as (columns, rows):
            if "path" not in columns:
                raise UserError(f"--exclude {path} needs the column path; it has {columns}")
            return list(dict.fromkeys(row["path"] for _, _, row in rows))
    except (OSError, csv.Error) as error:
        raise UserError(f"--exclude {path} cannot be read: {error}") from error


def read_soft_labels(path: Path) -> dict[str, dict[str, float]]:
    """image -> class -> probability, from a manifest's columns probability_CLASS; images whose cells are
    empty have none."""
    soft: dict[str, dict[str, float]] = {}
    first_of, seen = _Files(path.parent), dict[str, dict[str, str]]()
    with _table(path) as (columns, rows):
        columns = [name for name in columns if name.startswith(SOFT_COLUMN)]
        for line, _, row in rows if columns else ():
            image = first_of[row["path"]]
            cells = {normal(name.removeprefix(SOFT_COLUMN)): row[name] for name in columns}
            if seen.setdefault(image, cells) != cells:
                raise UserError(
                    f"{path} line {line}: {image!r} is listed twice, with other probabilities: keep one of "
                    "the two rows"
                )
            if any(cells.values()):
                try:
                    soft[image] = {name: float(cell) for name, cell in cells.items()}
                except ValueError as error:
                    raise UserError(f"{path} line {line}: not a probability: {error}") from error
    return soft


def soft_targets(
    paths: list[str],
    labels: dict[str, str],
    soft: dict[str, dict[str, float]],
    class_names: tuple[str, ...],
    source: str,
) -> NDArray[np.float32]:
    """[N, num_classes]; an image without probabilities has its label with certainty.

    Raises:
        UserError: the columns are not of these classes, or a row is no distribution.
    """
    targets = np.zeros((len(paths), len(class_names)), np.float32)
    for i, path in enumerate(paths):
        if path not in soft:
            targets[i, class_names.index(labels[path])] = 1
            continue
        if set(soft[path]) != set(class_names):
            raise UserError(
                f"{source} has the columns {SOFT_COLUMN}CLASS for {sorted(soft[path])}, its labels are "
                f"{sorted(class_names)}"
            )
        targets[i] = [soft[path][name] for name in class_names]
        if not (targets[i] >= 0).all() or abs(targets[i].sum() - 1) > 0.01:
            raise UserError(
                f"{source}: the probabilities of {path!r}, {targets[i].tolist()}, do not sum to 1"
            )
    return targets


def write_manifest(
    path: Path,
    images: Sequence[str],
    labels: Sequence[str],
    soft: Mapping[str, NDArray[np.float64]] | None = None,
    class_names: Sequence[str] = (),
) -> None:
    """Atomically; `soft` has the probabilities, in the order of `class_names`, of some of the images."""
    soft = soft or {}
    columns = [SOFT_COLUMN + name for name in class_names] if soft else []
    with atomic_write(path, "w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(["path", "label", *columns])
        for image, label in zip(images, labels, strict=True):
            cells = [float(p) for p in soft[image]] if image in soft else ["" for _ in columns]
            writer.writerow([image, label, *cells])

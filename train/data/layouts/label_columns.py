"""Choice of the columns of a label file: images, labels, soft labels."""

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path, PurePosixPath

from serve.contract.errors import UserError
from serve.contract.formats import describe_ignored
from serve.contract.image_column import find_image_columns
from serve.contract.image_files import HALF, SAMPLE_ROWS, ImageFiles, Naming, clean
from serve.contract.listing import has_image_suffix, list_images
from serve.contract.tables import Table, TableRow, split_names
from serve.contract.urls import is_remote, redact
from train.data.labels import RowsError, listed, normal
from train.data.layouts.label_candidates import (
    SHOWN,
    ColumnsError,
    column_flag,
    find_label_columns,
)
from train.data.layouts.parts import split_name
from train.data.layouts.soft_labels import SOFT_COLUMN

MANY_COLUMNS = 100
LONGEST_SHOWN = 100  # letters of a cell
FOLDER = "folder of the image"


@dataclass(frozen=True)
class LabelColumns:
    """Columns of a label file by what they hold."""

    image: int
    labels: list[int]
    """One of labels, or one for each class."""
    soft: dict[str, int]
    """Class -> the column of its probabilities."""
    split: int | None = None
    """Which says which rows train and which validate."""

    @property
    def used(self) -> list[int]:
        """Columns of images, labels and probabilities."""
        return [self.image, *self.labels, *self.soft.values()]


def choose_columns(
    source: Path, table: Table, files: ImageFiles, given: str
) -> tuple[Table, list[TableRow], LabelColumns]:
    """Return the table, its rows, and the columns of images, labels and probabilities; `given` is the value
    of --columns or "".

    Raises UserError when none or several of them may hold images or labels.
    """
    table = replace(table, rows=_rows(source, table, files))
    sample = list(islice(table.rows, SAMPLE_ROWS))
    if not sample and not table.find("path"):
        raise UserError(
            f"{source} is read as a label file (path,label), and has one line only: {table.columns[:SHOWN]}"
        )
    if len(table.first.cells) == 1 and not find_image_columns(table, sample, files):
        table, sample = table.separated_by_spaces(sample)
    names = split_names(given)
    numbered = all(map(str.isdecimal, names)) and any(len(table.find(name)) != 1 for name in names)
    if numbered and not table.headless:  # cells of a first line that is a row may be such numbers too
        table, sample = _without_header(table, sample)
    if given:
        image, *labels = _given_columns(source, table, given)
    else:
        image, labels = _image_column(source, table, sample, files), []
        if not table.headless and _is_row(source, table, sample, image, files):
            table, sample = _without_header(table, sample)
    others = [i for i in range(len(table.columns)) if i != image]
    distinct = all(len({row.cells[i] for row in sample}) == len(sample) for i in others)
    if not others or (table.headless and not labels and distinct):
        table, sample = _with_folders(table, sample, image)
    whole = chain(sample, table.rows)
    # the text matters where labels are in quotes; without it rows take half the memory
    read = [row if '"' in row.text else TableRow(row.line, "", row.cells) for row in whole]
    if table.columns[-1] == FOLDER:
        _check_folders(source, [row.cells[image] for row in read])
    labels = labels or find_label_columns(str(source), table.columns, read, image)
    for i in (image, labels[0]):
        if len(table.find(table.columns[i])) > 1:
            raise UserError(f"{source} has the column {table.columns[i]} twice: remove one of them")
    soft = {
        normal(name.removeprefix(SOFT_COLUMN)): i
        for i, name in enumerate(table.columns)
        if name.startswith(SOFT_COLUMN)
    }
    return table, read, LabelColumns(image, labels, soft)


def _rows(source: Path, table: Table, files: ImageFiles) -> Iterator[TableRow]:
    """Yield the rows. Raises RowsError for a wrong one if most of those before it name images."""
    before: list[TableRow] = []
    try:
        for row in table.rows:
            if len(before) < SAMPLE_ROWS:
                before.append(row)
            yield row
    except (UserError, csv.Error) as error:
        if not find_image_columns(table, before, files):
            raise
        raise RowsError(str(error) if isinstance(error, UserError) else f"{source} {error}") from error


def _without_header(table: Table, sample: list[TableRow]) -> tuple[Table, list[TableRow]]:
    table = table.without_header()
    return table, [next(table.rows), *sample]


def _with_folders(table: Table, sample: list[TableRow], image: int) -> tuple[Table, list[TableRow]]:
    """Return a list of images, CLASS/NAME, and its first rows with the folder of each as its label."""
    if not all("/" in clean(row.cells[image]) for row in sample):
        return table, sample

    def add(row: TableRow) -> TableRow:
        return row._replace(cells=[*row.cells, PurePosixPath(clean(row.cells[image])).parent.name])

    return replace(table, columns=[*table.columns, FOLDER], rows=map(add, table.rows)), [*map(add, sample)]


def _check_folders(source: Path, images: list[str]) -> None:
    """Raise UserError when folders may be no classes: some of one name are in different ones that are no
    parts of a data set, or all are parts."""
    first: dict[str, tuple[str, list[tuple[str, ...]]]] = {}
    for folder in dict.fromkeys(clean(image).rpartition("/")[0] for image in images):
        *above, name = PurePosixPath(folder).parts
        below = [rest for rest in (split_name(each)[1] for each in above) if rest]
        other, known = first.setdefault(name, (folder, below))
        if below != known:
            raise UserError(
                f"{source} names images in {other!r} and in {folder!r}, which may be one class or two: "
                "give it the columns path,label"
            )
    if len(first) > 1 and all(split_name(name)[0] for name in first):
        raise UserError(
            f"{source} names images in {listed(sorted(first))}, which are parts of a data set: give it the "
            "columns path,label"
        )


def _given_columns(source: Path, table: Table, given: str) -> list[int]:
    """Return the columns that --columns names."""
    found = []
    for name in split_names(given):
        indices = [i for i, column in enumerate(table.columns) if column == name] or table.find(name)
        if len(indices) != 1:
            raise UserError(
                f"--columns {given}: {source} has {len(indices) or 'no'} columns {name!r}; it has "
                f"{listed(table.columns, SHOWN)}"
            )
        found += indices
    if len(found) < 2:
        raise UserError(
            f"--columns {given}: name the column of the images and that of the labels, as id,breed"
        )
    return found


def _image_column(source: Path, table: Table, sample: list[TableRow], files: ImageFiles) -> int:
    named = table.find("path")
    if len(named) == 1 and _has_images([row.cells[named[0]] for row in sample], files):
        return named[0]
    found = find_image_columns(table, sample, files)
    if len(found) == 1:
        return found[0]
    if named:
        return named[0]
    if not found:
        raise UserError(f"{source}: {_no_images(table, sample, files)}")
    names = [table.columns[i] for i in found]
    rest = [name for name in table.columns if name not in names]
    flags = [column_flag(name, *rest[:1]) for name in names[:2]]
    raise ColumnsError(
        f"{source}: the columns {listed(names)} all name images, and not the same: give the "
        f"columns of the images and of the labels, as in {' or '.join(flags)}"
    )


def _has_images(values: list[str], files: ImageFiles) -> bool:
    values = [value for value in dict.fromkeys(values) if value.strip()]
    return files.locate(values)[1] >= HALF * len(values)


def _is_row(source: Path, table: Table, sample: list[TableRow], image: int, files: ImageFiles) -> bool:
    """Return whether the first line names an image too. Raises UserError if it may be both."""
    naming, _ = files.locate([row.cells[image] for row in sample])
    if not files.find(table.columns[image], naming):
        return False
    others = [i for i in range(len(table.columns)) if i != image]
    if others and not any(row.cells[i] == table.columns[i] for row in sample for i in others):
        line = table.first.text.strip()
        raise UserError(
            f"{source}: the first line, {line!r}, may be a row, since it names an image: write the names "
            "of the columns, path,label, into a line before it"
        )
    return True


def _no_images(table: Table, sample: list[TableRow], files: ImageFiles) -> str:
    """Return why no column names images."""
    cells = sample[0].cells if sample else []
    shown = ", ".join(
        f"{name!r} {redact(cell)[:LONGEST_SHOWN]!r}"
        for name, cell in zip(table.columns[:SHOWN], cells, strict=False)
    )
    line = f"no column of the label file (path,label) names images: {shown or repr(table.columns[:SHOWN])}"
    if len(table.columns) > MANY_COLUMNS:
        return (
            f"{line}, ...: if its {len(table.columns)} columns are pixels, write each row as an image file"
        )
    usual = (cell for cell in cells if has_image_suffix(cell) or is_remote(cell))
    likely = next(usual, cells[0] if cells else "")
    return f"{line}{', ...' if table.columns[SHOWN:] else ''}; {describe_lost(likely, files)}"


def describe_lost(value: str, files: ImageFiles) -> str:
    """Return where an image was sought, and, if there are none, what else is in the folder."""
    ignored = Counter[str]() if files.below else list_images(files.folder).ignored
    del ignored[PurePosixPath(files.table).suffix.lower()]
    return "; ".join([files.describe(value), *describe_ignored(ignored)])


def describe_columns(columns: list[str], chosen: LabelColumns, naming: Naming) -> list[str]:
    """Return what was inferred about columns and paths; [] for path and label as they are."""
    image, labels = columns[chosen.image], [columns[i] for i in chosen.labels]
    facts = [
        f"images: column {image!r}{naming.describe()}",
        f"labels: column{'s' if len(labels) > 1 else ''} {listed(labels, SHOWN)}",
    ]
    if (image.casefold(), labels[0].casefold(), naming.describe()) == ("path", "label", ""):
        facts = []
    return facts + ([f"parts: column {columns[chosen.split]!r}"] if chosen.split is not None else [])

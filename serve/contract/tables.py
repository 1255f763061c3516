"""Tables in text files (CSV): encoding, separator, first line and rows, as people and programs write."""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, starmap, takewhile
from typing import IO, Any, NamedTuple

from serve.contract.errors import UserError
from serve.contract.listing import has_image_suffix
from serve.contract.text_encoding import open_text

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars", " ": "spaces"}
SAMPLE_LINES, SAMPLE_OBJECTS = 50, 1000
SEPARATOR_LINE = re.compile(r"\"?sep=(.)\"?\s*")  # Excel's own first line
JSON_START = re.compile(r"\{|\[\s*(?:[{\"]|$)")
ONE_FOR_EACH = (
    'write an object for each image, as {"path": "images/1.jpg", "label": "cat"}, or a CSV file with the '
    "columns path,label"
)
PADDING = " \t\ufeff"
LONGEST_CELL = 1 << 24  # characters: masks and boxes beside a label may pass the csv module's 131,072


class TableRow(NamedTuple):
    line: int
    """Number of its last line in the file."""
    text: str
    """As it is in the file; cells have lost their quotes."""
    cells: list[str]
    """One for each column."""


@dataclass(frozen=True)
class Table:
    columns: list[str]
    """Names in the first line; without such a line, "1", "2", ..."""
    rows: Iterator[TableRow]
    delimiter: str
    first: TableRow
    """The first line."""
    headless: bool = False
    """Whether the first line is a row."""

    def without_header(self) -> "Table":
        """Return the same table with its first line as a row."""
        columns = [str(i + 1) for i in range(len(self.columns))]
        return replace(self, columns=columns, rows=chain([self.first], self.rows), headless=True)

    def separated_by_spaces(self, sample: list[TableRow]) -> tuple["Table", list[TableRow]]:
        """Return the same table of one column, and its first rows, as one of words: `sample` has as many or
        more in each row, and the last column takes them."""
        width = min(len(row.cells[0].split()) for row in [self.first, *sample])
        if width < 2:
            return self, sample

        def divided(row: TableRow) -> TableRow:
            cells = [cell.strip() for cell in row.cells[0].split(None, width - 1)]
            return row._replace(cells=cells + [""] * (width - len(cells)))

        first = divided(self.first)
        columns = [str(i + 1) for i in range(width)] if self.headless else first.cells
        rows = map(divided, self.rows)
        return replace(self, columns=columns, rows=rows, delimiter=" ", first=first), [
            *map(divided, sample)
        ]

    def find(self, name: str) -> list[int]:
        """Return the columns of this name, in capitals or not."""
        return [i for i, column in enumerate(self.columns) if column.casefold() == name.casefold()]

    def facts(self) -> list[str]:
        """Return what was inferred about the form of the file."""
        facts = [] if self.delimiter == "," else [f"separated by {DELIMITERS.get(self.delimiter, 'marks')}"]
        return facts + (["without names of columns in the first line"] if self.headless else [])


def split_names(text: str) -> list[str]:
    """Return names of columns that are separated by commas, each in double quotes if it holds one."""
    return [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]


def allow_long_cells() -> None:
    """Raise the csv module's limit, which is that of all readers of the process."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))


def read_table(file: IO[bytes], name: str) -> Table:
    """Return the table in `file`, in UTF-8 (what is none of it is kept as it is) or UTF-16.

    A first line that holds the name of an image is a row. Its rows are read as they are iterated over, and
    empty ones are left out.

    Raises:
        UserError: a row has too many cells, repeats the first line or holds NUL characters. OSError,
        csv.Error, UnicodeDecodeError: it cannot be read.
    """
    allow_long_cells()
    text = open_text(file, newline="")
    sample = list(islice(text, SAMPLE_LINES))
    if sample and JSON_START.match(sample[0]):
        return _json_table(chain(sample, text), name)
    separator = SEPARATOR_LINE.fullmatch(sample[0]) if sample else None
    skipped = 1 if separator else sum(1 for _ in takewhile(_is_comment, sample[:-1]))
    delimiter = separator[1] if separator else _delimiter(sample[skipped:])
    rows = _rows(chain(sample[skipped:], text), delimiter, skipped)
    first = next((row for row in rows if any(row.cells)), TableRow(0, "", []))
    columns = [cell.strip(PADDING) for cell in first.cells]
    headless = any(map(has_image_suffix, columns))
    table = Table(columns, _checked(rows, columns, name, headless), delimiter, first)
    return table.without_header() if headless else table


def _json_table(lines: Iterator[str], name: str) -> Table:
    """Return the table of JSON Lines, or of a list of objects, with the keys of the first ones as columns:
    keys of objects inside are joined by dots, as pandas.json_normalize does."""

    def objects() -> Iterator[tuple[TableRow, dict[str, Any]]]:
        for number, line in enumerate(_json_lines(lines, name), 1):
            if line.strip():
                yield (
                    TableRow(number, line, []),
                    dict(_flat(_json_object(line, f"{name} line {number}"), "")),
                )

    def row(place: TableRow, values: dict[str, Any]) -> TableRow:
        if new := sorted(values.keys() - known):
            raise UserError(
                f"{name} line {place.line} has the key {new[0]!r}, which none of the first "
                f"{SAMPLE_OBJECTS} objects has: give it to the first one, too (null is no value)"
            )
        cells = [values.get(key) for key in keys]
        texts = ["" if c is None else c if isinstance(c, str) else json.dumps(c) for c in cells]
        return place._replace(cells=texts)

    rows = objects()
    sample = list(islice(rows, SAMPLE_OBJECTS))
    keys = list(dict.fromkeys(key for _, values in sample for key in values))
    known = set(keys)
    return Table(keys, starmap(row, chain(sample, rows)), ",", sample[0][0])


def _json_lines(lines: Iterator[str], name: str) -> Iterator[str]:
    """Yield the lines, or those of the objects in a list or below names of images. Raises UserError for
    other JSON."""
    first, second = next(lines), next(lines, "")
    if second and first.startswith("{") and first.rstrip().endswith("}"):
        yield from chain([first, second], lines)
        return
    try:
        records = json.loads("".join([first, second, *lines]))
    except ValueError as error:
        raise UserError(f"{name} is neither JSON Lines nor a list of objects: {error}") from error
    if isinstance(records, dict) and all(map(has_image_suffix, records)):
        cells = {
            path: cell if isinstance(cell, dict) else {"label": cell} for path, cell in records.items()
        }
        records = [{"path": path, **cell} for path, cell in cells.items()]
    if isinstance(records, dict) and not any(isinstance(cell, list) for cell in records.values()):
        records = [records]
    if not isinstance(records, list) or not records:
        raise UserError(f"{name} is no list of JSON objects: {ONE_FOR_EACH}")
    yield from map(json.dumps, records)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{where} is no JSON object: {ONE_FOR_EACH}")
    return values


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (keys joined by dots, value): of lists of one entry that entry, of objects in a list the
    different values of each key."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        found: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        for name, cell in chain.from_iterable(_flat(entry, key) for entry in value):
            found[name][json.dumps(cell)] = cell
        for name, cells in found.items():
            yield name, next(iter(cells.values())) if len(cells) == 1 else list(cells.values())
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _flat(each, f"{key}.{name}" if key else name)
    else:
        yield key, None if value == [] else value


def _rows(lines: Iterable[str], delimiter: str, skipped: int) -> Iterator[TableRow]:
    read: list[str] = []

    def remembered() -> Iterator[str]:
        for line in lines:
            read.append(line)
            yield line

    if delimiter == " ":  # a file's name may hold spaces, its label is the last word
        for number, line in enumerate(lines, 1 + skipped):
            yield TableRow(number, line, line.rsplit(None, 1))
        return
    # strict: else a quote that is left open takes all that follows
    reader = csv.reader(remembered(), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            yield TableRow(reader.line_num + skipped, "".join(read), cells)
            read.clear()
    except csv.Error as error:
        start = reader.line_num + skipped - len(read) + 1
        raise csv.Error(f"line {start}: {error}; write a quote inside of a cell in quotes twice") from error


def _checked(rows: Iterator[TableRow], columns: list[str], name: str, headless: bool) -> Iterator[TableRow]:
    for row in rows:
        cells, width = row.cells, len(columns)
        if any(cells[width:]):
            raise UserError(
                f"{name} line {row.line} has {len(cells)} cells for {width} columns: "
                "write what holds a comma in double quotes, and the names of all columns in the first line"
            )
        if not headless and [cell.strip(PADDING) for cell in cells] == columns:
            line = repr(row.text.strip())
            raise UserError(f"{name} line {row.line} repeats the first line, {line}: remove it")
        if "\0" in row.text:
            raise UserError(f"{name} line {row.line} holds a NUL character: {row.text.strip()!r}")
        if any(cells):
            whole = cells if len(cells) == width else cells[:width] + [""] * (width - len(cells))
            yield TableRow(row.line, row.text, whole)


def _is_comment(line: str) -> bool:
    """Return whether a line before the first one is a remark: names of columns are separated by marks."""
    names = any(mark in line for mark in DELIMITERS if mark != " ")
    return line.startswith("#") and not names and not has_image_suffix(line.split()[0])


def _delimiter(lines: list[str]) -> str:
    """Return the separator that cuts each line into as many cells as the first one, or is most frequent
    in that; "," without any."""
    first = lines[0] if lines else ""
    marks = [mark for mark in DELIMITERS if mark in first and mark != " "]
    widths = {mark: {len(row) for row in csv.reader(lines, delimiter=mark) if row} for mark in marks}
    if alike := [mark for mark in marks if len(widths[mark]) == 1 and max(widths[mark]) > 1]:
        last = {mark: next(csv.reader(lines[-1:], delimiter=mark), []) for mark in alike}
        return max(alike, key=lambda mark: (any(map(has_image_suffix, last[mark])), len(last[mark])))
    if marks:
        return max(marks, key=first.count)
    words = [line.rsplit(None, 1) for line in lines if line.strip()]
    listed = all(len(pair) == 2 and has_image_suffix(pair[0]) for pair in words[1:])
    if " " in first and listed and (has_image_suffix(words[0][0]) or len(first.split()) == 2):
        return " "
    return ","

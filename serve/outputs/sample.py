"""The sample of a submission that a contest ships: its header, its ids, and how its rows are written."""

import codecs
import csv
from collections.abc import Sequence
from dataclasses import dataclass

from serve import storage
from serve.contract.errors import UserError
from serve.contract.packed import describe_open
from serve.contract.tables import Table, TableRow, read_table
from serve.contract.text_encoding import text_encoding
from serve.contract.urls import is_remote, redact

MOST_VALUES = 50_000  # different ones that are looked at


@dataclass(frozen=True)
class Sample:
    path: str
    header: str
    """First line as it is, with its end."""
    columns: list[str]
    """Names of the columns beside the ids."""
    ids: list[str]
    """[N], each once."""
    values: set[str]
    """Different texts below `columns`, without white space around them."""
    first: list[str]
    """Those of the first row."""
    delimiter: str
    newline: str
    quoted: tuple[bool, bool]
    """Whether ids, and whether values, are in quotes also where they need none."""
    encoding: str

    def __str__(self) -> str:
        return f"--sample-submission {redact(self.path)}"

    def line(self, row_id: str, cells: list[str]) -> str:
        """Return a row as the sample would have it."""
        quoted_ids, quoted_values = self.quoted
        texts = [self._cell(row_id, quoted_ids), *(self._cell(cell, quoted_values) for cell in cells)]
        return self.delimiter.join(texts) + self.newline

    def _cell(self, text: str, quoted: bool) -> str:
        if quoted or any(character in text for character in (self.delimiter, '"', "\r", "\n")):
            return '"' + text.replace('"', '""') + '"'
        return text


def read_sample(path: str) -> Sample:
    """Read a local file or a URL. Memory holds all ids.

    Raises:
        UserError: it is no table of ids and at least one further column.
    """
    where = f"--sample-submission {redact(path)}"
    try:
        with storage.download(path) if is_remote(path) else open(path, "rb") as file:
            if packed := describe_open(file, redact(path)):  # as contests ship it
                raise UserError(f"{where} is {packed}")
            file.seek(0)
            beginning = file.read(4)
            file.seek(0)
            return _sample_of(read_table(file, where), path, where, beginning)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{where}: {error.strerror or 'does not exist'}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{where} is not CSV: {error}") from error


def _sample_of(table: Table, path: str, where: str, beginning: bytes) -> Sample:
    header = table.first.text
    if len(table.columns) < 2 or table.headless or header.startswith("{"):
        raise UserError(f"{where}: its first line, {header[:80]!r}, must name two columns or more")
    ids: dict[str, None] = {}
    values: set[str] = set()
    first: TableRow | None = None
    for row in table.rows:
        row_id, *cells = row.cells
        if not row_id.strip() or row_id in ids:
            problem = "occurs twice, and the first column must hold ids" if row_id in ids else "is no id"
            raise UserError(f"{where}: {row_id!r} in line {row.line} {problem}")
        first = first or row
        ids[row_id] = None
        if len(values) < MOST_VALUES:
            values.update(cell.strip() for cell in cells)
    if first is None:
        raise UserError(f"{where} has a header and no rows")
    tokens = first.text.strip("\r\n").split(table.delimiter)
    quoted = tokens[0].startswith('"'), all(token.startswith('"') for token in tokens[1:])
    encoding = text_encoding(beginning)
    if encoding == "utf-8-sig":  # the mark is a part of the header, if there is one
        encoding, mark = "utf-8", "\ufeff" if beginning.startswith(codecs.BOM_UTF8) else ""
        header = mark + header
    return Sample(
        path,
        header,
        table.columns[1:],
        list(ids),
        values,
        [cell.strip() for cell in first.cells[1:]],
        table.delimiter,
        header[len(header.rstrip("\r\n")) :],
        quoted,
        encoding,
    )


def few(names: Sequence[str]) -> str:
    """Return the first names for a message, and how many there are."""
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown}, ... ({len(names)})" if names[5:] else shown

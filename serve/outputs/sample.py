"""The sample of a submission that a contest ships: its header, its ids, and how its rows are written."""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from serve import storage
from serve.contract.errors import UserError
from serve.contract.packed import LONGEST_BEGINNING, packed_by_content
from serve.contract.urls import is_remote, redact

DELIMITERS = ",;\t|"
MOST_VALUES = 50_000  # different ones that are looked at
ROWS_EXAMINED = 1000  # of a file that may be replaced
# A probability as numpy writes it, which is never 0 or 1 alone: labels are whole numbers
PROBABILITY = re.compile(r"\d\.\d+(e-\d+)?|\d(\.\d+)?e-\d+", re.ASCII)


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

    def is_submission(self, file: IO[bytes]) -> bool:
        """Return whether a file has this header, these ids, and probabilities, as no file of labels has."""
        head = self.header.encode()
        if file.read(len(head)) != head:
            return False
        lines = (line.decode() for line in file)
        rows = csv.reader(lines, delimiter=self.delimiter)
        for _, row_id, row in zip(range(ROWS_EXAMINED), self.ids, rows, strict=False):
            if row[:1] != [row_id] or not all(PROBABILITY.fullmatch(cell) for cell in row[1:]):
                return False
        return True


def read_sample(path: str) -> Sample:
    """Read a local file or a URL. Memory holds all ids.

    Raises:
        UserError: it is no table of ids and at least one further column.
    """
    where = f"--sample-submission {redact(path)}"
    try:
        with storage.download(path) if is_remote(path) else open(path, "rb") as file:
            if packed := packed_by_content(file.read(LONGEST_BEGINNING)):  # as contests ship it
                raise UserError(f"{where} is {packed.kind}: unpack it first")
            file.seek(0)
            return _parse(path, where, file)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{where}: {error.strerror or 'does not exist'}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: convert it, as by iconv -f UTF-16 -t UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{where} is not CSV: {error}") from error


def _parse(path: str, where: str, file: IO[bytes]) -> Sample:
    taken: list[str] = []
    lines = _lines(file, taken)
    first_line = next(lines, "")
    taken.clear()
    delimiter = max(DELIMITERS, key=first_line.count)
    reader = csv.reader(_chained(first_line, lines, taken), delimiter=delimiter, strict=True)
    names = next(reader, [])
    header = "".join(taken)
    if len(names) < 2:
        raise UserError(
            f"{where}: its first line, {first_line[:80]!r}, has no two columns between , ; | or tabs"
        )
    ids: dict[str, None] = {}
    values: set[str] = set()
    first: list[str] = []
    quoted = (False, False)
    taken.clear()
    for row in reader:
        if row:
            if len(row) != len(names) or not row[0].strip() or row[0] in ids:
                problem = "occurs twice" if row[0].strip() and row[0] in ids else "does not fit the header"
                raise UserError(f"{where}: line {reader.line_num}, {taken[0][:80]!r}, {problem}")
            if not ids:
                first = [cell.strip() for cell in row[1:]]
                tokens = "".join(taken).rstrip("\r\n").split(delimiter)
                quoted = tokens[0].startswith('"'), all(token.startswith('"') for token in tokens[1:])
            ids[row[0]] = None
            if len(values) < MOST_VALUES:
                values.update(cell.strip() for cell in row[1:])
        taken.clear()
    if not ids:
        raise UserError(f"{where} has a header and no rows")
    newline = "\r\n" if header.endswith("\r\n") else "\n"
    columns = [name.strip() for name in names[1:]]
    return Sample(path, header, columns, list(ids), values, first, delimiter, newline, quoted)


def _lines(file: IO[bytes], taken: list[str]) -> Iterator[str]:
    """Yield lines, and append them to `taken` as the reader takes them."""
    for line in file:
        text = line.decode()
        taken.append(text)
        yield text


def _chained(first: str, rest: Iterator[str], taken: list[str]) -> Iterator[str]:
    taken.append(first)
    yield first.removeprefix("\ufeff")
    yield from rest


def few(names: Sequence[str]) -> str:
    """Return the first names for a message, and how many there are."""
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown}, ... ({len(names)})" if names[5:] else shown

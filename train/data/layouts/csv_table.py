"""CSV table in UTF-8 or UTF-16: its columns, and its rows with their line numbers."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from serve.contract.errors import UserError
from train.data.text_encoding import text_encoding


class Row(NamedTuple):
    line: int
    """Number of its last line in the file."""
    text: str
    """As it is in the file; cells have lost their quotes."""
    cells: dict[str, str]


@contextmanager
def open_table(path: Path) -> Iterator[tuple[list[str], Iterator[Row]]]:
    """Open a CSV file and yield (columns, rows); path, label and split may be in capitals.

    Raises:
        UserError: not decodable, the header repeated, a row with more cells than columns, a NUL character.
        OSError, csv.Error: the file cannot be read.
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
            yield columns, _rows(path, header, columns, file, reader.line_num, spaced)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} begins as UTF-16 does, but is none: save it as UTF-8") from error


def _column(name: str, header: Sequence[str]) -> str:
    lowered = name.strip().casefold()
    return lowered if lowered in ("path", "label", "split") and lowered not in header else name.strip()


def _rows(
    path: Path, header: list[str], columns: list[str], file: Iterable[str], line: int, spaced: bool
) -> Iterator[Row]:
    """Yield the rows after the header, which ends in `line`; `spaced`: cells begin with a space."""
    read: list[str] = []

    def remembered() -> Iterator[str]:
        for text in file:
            read.append(text)
            yield text

    reader = csv.reader(remembered(), strict=True, skipinitialspace=spaced)
    for cells in reader:
        text, number = "".join(read), line + reader.line_num
        read.clear()
        if not any(cells):
            continue
        if any(cells[len(columns) :]):
            raise UserError(
                f"{path} line {number} has {len(cells)} cells for {len(columns)} columns: write what holds "
                "a comma in double quotes"
            )
        if cells == header:
            raise UserError(f"{path} line {number} repeats the first line: remove it")
        if "\0" in text:
            raise UserError(f"{path} line {number} holds a NUL character: it is no text")
        yield Row(number, text, dict(zip(columns, [*cells, *("" for _ in columns)], strict=False)))

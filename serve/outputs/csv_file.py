"""Rows as CSV: path, label, probability, then probability_CLASS or label_2, probability_2, ..., error."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from serve.contract.errors import UserError
from serve.contract.tables import LONGEST_CELL, allow_long_cells
from serve.outputs.layout import Format, Joiner, Layout, Row, Writer, are_columns

MAX_HEADER_LINES = 100_000  # a class's name may hold line ends


class CsvLines:
    """What a csv.writer writes to: lines in UTF-8 that end with a plain newline.

    Before Python 3.13, a csv.writer with that line end does not quote a name with a carriage return, and
    a reader would see two rows.
    """

    def __init__(self, file: IO[bytes]):
        self.file = file

    def write(self, line: str) -> None:
        self.file.write((line.removesuffix("\r\n") + "\n").encode("utf-8", "backslashreplace"))


class CsvWriter(Writer):
    def __init__(self, file: IO[bytes], layout: Layout):
        self.layout = layout
        self.writerow = csv.writer(CsvLines(file), lineterminator="\r\n").writerow
        self.writerow(["path", "label", "probability", *layout.columns, "error"])

    def write(self, row: Row) -> None:
        if row.probabilities is None:
            self.writerow([row.path, "", "", *("" for _ in self.layout.columns), row.error])
            return
        likeliest = self.layout.likeliest(row.probabilities)
        # str of a float32 is the shortest text that reads back as the same number
        ranked = [(self.layout.class_names[i], str(row.probabilities[i])) for i in likeliest]
        others = [cell for pair in ranked[1:] for cell in pair]
        values = others if self.layout.top_k else [str(p) for p in row.probabilities]
        self.writerow([row.path, *ranked[0], *values, ""])


class CsvJoiner(Joiner):
    def __init__(self, file: IO[bytes]):
        self.file = file
        self.header = b""

    def add(self, part: Path) -> Iterator[str]:
        with part.open("rb") as file:
            for number, (raw, cells) in enumerate(_records(file)):
                if number:
                    self.file.write(raw)
                    yield cells[0]
                elif not self.header:
                    self.header = raw
                    self.file.write(raw)
                elif raw != self.header:
                    raise UserError(f"{part} has other columns than the parts before it")


def begins_as_csv(file: IO[bytes]) -> bool:
    raw, columns = next(_records(file, MAX_HEADER_LINES), (b"", []))
    return are_columns(columns) and raw.endswith(b",error\n")


def _records(file: IO[bytes], max_lines: int = 0) -> Iterator[tuple[bytes, list[str]]]:
    """Yield the bytes and the cells of each record; 0 lines: all. Memory is one record."""
    lines: list[bytes] = []

    def read() -> Iterator[str]:
        while line := file.readline(LONGEST_CELL if max_lines else -1):
            if max_lines and len(lines) == max_lines:
                return
            lines.append(line)
            yield line.decode()

    allow_long_cells()  # a name may be longer than the csv module's own limit
    for cells in csv.reader(read(), strict=bool(max_lines)):
        yield b"".join(lines), cells
        lines.clear()


CSV = Format("csv", ".csv", CsvWriter, begins_as_csv, open_joiner=CsvJoiner)

"""What an output may replace without --overwrite: predictions, told by their contents."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from typing import IO

MAX_HEADER_BYTES = 1 << 24  # of the column names of very many classes
MAX_HEADER_LINES = 100_000
# of Kaggle's form: ends in a probability as numpy writes it, which is never 0 or 1 alone, or in nothing
FLOAT = re.compile(rb"[^\n]*,(\d\.\d+(e-\d+)?|\d(\.\d+)?e-\d+)?")
KAGGLE_ROWS = 1000
PARQUET_MARK = b"PAR1"


def is_predictions(file: IO[bytes]) -> bool:
    """Whether a seekable file is empty, or begins as the predictions that serve/outputs/writers.py writes.

    Byte for byte: what a spreadsheet or an editor saved anew is somebody's work.
    """
    line = file.readline(MAX_HEADER_BYTES)
    file.seek(0)
    if not line or line == b"id,label\n":
        # A file of labels has these columns too, with whole numbers.
        rows = [file.readline(MAX_HEADER_BYTES) for _ in range(KAGGLE_ROWS)][1:]
        return all(FLOAT.fullmatch(row.removesuffix(b"\n")) for row in rows if row)
    if line.startswith(PARQUET_MARK):
        return _is_parquet(file)
    try:
        if line.startswith(b"{"):
            return _are_columns(list(json.loads(line)))
        return _is_header(file)
    except (ValueError, csv.Error, RecursionError):
        return False


def _is_header(file: IO[bytes]) -> bool:
    lines: list[str] = []  # a class's name may hold line ends

    def read() -> Iterator[str]:
        while len(lines) < MAX_HEADER_LINES and (line := file.readline(MAX_HEADER_BYTES)):
            lines.append(line.decode())
            yield lines[-1]

    before = csv.field_size_limit(MAX_HEADER_BYTES)
    try:
        columns = next(csv.reader(read(), strict=True), [])
    finally:
        csv.field_size_limit(before)
    return _are_columns(columns) and lines[-1].endswith(",error\n")


def _are_columns(names: Sequence[str]) -> bool:
    """Of CSV, Parquet, or an object of JSON Lines."""
    between = {"embedding", "top", "probabilities"}
    return (
        list(names[:3]) == ["path", "label", "probability"]
        and list(names[-1:]) == ["error"]
        and all(name in between or re.match("probability_|label_", name) for name in names[3:-1])
    )


def _is_parquet(file: IO[bytes]) -> bool:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:  # then it is not replaced by another format either
        return False
    try:
        file.seek(0)
        return _are_columns(parquet.read_schema(file).names)
    except (OSError, ArrowException):
        return False

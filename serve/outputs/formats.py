"""The formats of an output, by name, by suffix, and by what a file holds."""

import csv
import os
from collections.abc import Callable
from typing import IO

from serve.contract.errors import UserError
from serve.outputs.csv_file import CSV
from serve.outputs.jsonl import JSONL
from serve.outputs.layout import Format
from serve.outputs.parquet import PARQUET

FORMATS = {form.name: form for form in (CSV, JSONL, PARQUET)}
BY_SUFFIX = {suffix: form for form in FORMATS.values() for suffix in (form.suffix, *form.other_suffixes)}


def format_of(output: str) -> Format:
    """Return the suffix's format, CSV without a suffix. Raises UserError for any other suffix."""
    suffix = os.path.splitext(output)[1].lower()
    if not suffix:
        return CSV
    if suffix not in BY_SUFFIX:
        raise UserError(f"--output {output!r}: {suffix!r} is none of {', '.join(BY_SUFFIX)}; add --format")
    return BY_SUFFIX[suffix]


def is_predictions(file: IO[bytes]) -> bool:
    """Return whether a seekable file is empty, or begins as the predictions that a format writes.

    Byte for byte: what a spreadsheet or an editor saved anew is somebody's work.
    """
    return not file.read(1) or any(_begins_as(form.begins, file) for form in FORMATS.values())


def _begins_as(test: Callable[[IO[bytes]], bool], file: IO[bytes]) -> bool:
    file.seek(0)
    try:
        return test(file)
    except (ValueError, csv.Error, RecursionError):
        return False

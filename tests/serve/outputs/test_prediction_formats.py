"""Formats are chosen by suffix, and write the same names."""

import csv
import json
import os
from pathlib import Path

import pytest
from pyarrow import parquet
from written import STRANGE, row_of, write

from serve.inputs.inventory import printable
from serve.outputs.formats import format_of
from serve.outputs.layout import Layout


@pytest.mark.parametrize("format_name", ["csv", "jsonl", "parquet"])
def test_every_format_writes_the_same_names(tmp_path: Path, format_name: str) -> None:
    names = [*STRANGE, os.fsdecode(b"caf\xe9.jpg"), "\ud800.jpg"]
    path = write(tmp_path / "x", format_name, (row_of(name, 0, 1) for name in names), Layout(("a", "b")))
    if format_name == "csv":
        with path.open(newline="", encoding="utf-8") as file:
            read = [record[0] for record in csv.reader(file)][1:]
    elif format_name == "jsonl":
        read = [json.loads(line)["path"] for line in path.read_bytes().splitlines()]
    else:
        read = parquet.read_table(path)["path"].to_pylist()
    assert read == list(map(printable, names))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("a.csv", "csv"),
        ("a.JSONL", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("a.b/c.parquet", "parquet"),
        ("a", "csv"),
    ],
)
def test_the_format_is_the_suffixs(output: str, expected: str) -> None:
    assert format_of(output).name == expected


def test_an_unknown_suffix_is_not_guessed() -> None:
    with pytest.raises(ValueError, match=r"a\.json.*\.csv, \.jsonl.*--format"):
        format_of("a.json")

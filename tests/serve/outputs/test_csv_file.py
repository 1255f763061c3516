"""CSV reads back as what was written, whatever names hold."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_model import CLASS_NAMES
from written import ROWS, STRANGE, row_of, write

from serve.outputs.layout import Layout, Row


def csv_rows(tmp_path: Path, rows: Iterable[Row], class_names: tuple[str, ...]) -> list[list[str]]:
    path = write(tmp_path / "out.csv", "csv", rows, Layout(class_names))
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_csv_columns(tmp_path: Path) -> None:
    csv_rows(tmp_path, ROWS, CLASS_NAMES)
    assert (tmp_path / "out.csv").read_bytes() == (
        b"path,label,probability,probability_red,probability_green,probability_blue,error\n"
        b"a.jpg,green,0.5,0.125,0.5,0.375,\n"
        b"b.jpg,,,,,,truncated\n"
    )


def test_any_file_name_and_class_name_is_one_cell(tmp_path: Path) -> None:
    rows = [row_of(name, 0.25, 0.75) for name in STRANGE] + [Row(name, error=name) for name in STRANGE]
    table = csv_rows(tmp_path, rows, ("a, b", "dog\n"))
    assert table[0] == ["path", "label", "probability", "probability_a, b", "probability_dog\n", "error"]
    assert table[1:] == [
        *([name, "dog\n", "0.75", "0.25", "0.75", ""] for name in STRANGE),
        *([name, "", "", "", "", name] for name in STRANGE),
    ]


def test_a_file_name_that_is_not_utf8_is_written_with_escapes(tmp_path: Path) -> None:
    rows = [row_of(os.fsdecode(b"caf\xe9.jpg"), 0, 1)]
    assert csv_rows(tmp_path, rows, ("a", "b"))[1][0] == r"caf\udce9.jpg"


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=5))
def test_probabilities_read_back_as_the_same_float32(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    probabilities = np.array(values, np.float32)
    names = tuple("abcde"[: len(values)])
    table = csv_rows(tmp_path_factory.getbasetemp(), [Row("x", probabilities)], names)
    np.testing.assert_array_equal(np.array(table[1][3:-1], np.float32), probabilities)
    assert table[1][1] == names[int(np.argmax(probabilities))]
    assert np.float32(table[1][2]) == probabilities.max()


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [
        (1, b"path,label,probability,error\na.jpg,green,0.5,\nb.jpg,,,truncated\n"),
        (
            2,
            b"path,label,probability,label_2,probability_2,error\n"
            b"a.jpg,green,0.5,blue,0.375,\nb.jpg,,,,,truncated\n",
        ),
        (
            3,
            b"path,label,probability,label_2,probability_2,label_3,probability_3,error\n"
            b"a.jpg,green,0.5,blue,0.375,red,0.125,\nb.jpg,,,,,,,truncated\n",
        ),
    ],
)
def test_csv_of_the_likeliest_classes(tmp_path: Path, top_k: int, expected: bytes) -> None:
    path = write(tmp_path / "out.csv", "csv", ROWS, Layout(CLASS_NAMES, top_k))
    assert path.read_bytes() == expected

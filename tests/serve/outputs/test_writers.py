"""What is written reads back the same, in every format, and a file appears whole or not at all."""

import csv
import errno
import json
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from serve_model import CLASS_NAMES
from written import ROWS, row_of, write

from serve.contract.files import atomic_writer
from serve.inputs.inventory import printable
from serve.outputs.layout import Layout, Row
from serve.outputs.writers import check_kaggle, format_of, kaggle_meaning


def test_a_file_appears_whole(tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    with atomic_writer(output) as file:
        file.write("고양이\n".encode())
        file.flush()
        assert not output.exists()
    assert output.read_text(encoding="utf-8") == "고양이\n"
    assert os.listdir(tmp_path) == ["out.csv"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_while_writing_leaves_nothing_new(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "old.csv").write_text("yesterday's\n")
    for name in ("old.csv", "new.csv"):
        with pytest.raises(error), atomic_writer(tmp_path / name) as file:  # noqa: PT012
            file.write(b"half of to")
            raise error
    assert os.listdir(tmp_path) == ["old.csv"]
    assert (tmp_path / "old.csv").read_text() == "yesterday's\n"


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EIO, "Input/output error"), False),  # perhaps of what is read meanwhile
    ],
    ids=repr,
)
def test_a_full_disk_is_an_error_that_names_the_output(tmp_path: Path, error: OSError, named: bool) -> None:
    with pytest.raises(OSError, match=str(error.strerror)) as raised, atomic_writer(tmp_path / "out.csv"):
        raise error
    assert raised.value.filename == (str(tmp_path / "out.csv") if named else None)


def test_two_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    """Two pods can run the same job at once, on a shared folder, both with process id 1."""
    output = tmp_path / "out.csv"
    with atomic_writer(output) as first:
        first.write(b"first, a longer text\n")
        with atomic_writer(output) as second:
            second.write(b"second\n")
        assert output.read_text() == "second\n"
    assert output.read_text() == "first, a longer text\n"
    assert os.listdir(tmp_path) == ["out.csv"]


def test_a_finished_file_can_be_read_by_others(tmp_path: Path) -> None:
    with atomic_writer(tmp_path / "out.csv"):
        pass
    (tmp_path / "plain").touch()
    assert (tmp_path / "out.csv").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_is_written_through(tmp_path: Path) -> None:
    """/dev/stdout is a link: it must not become a file."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "latest.csv").symlink_to("folder/out.csv")
    with atomic_writer(tmp_path / "latest.csv") as file:
        file.write(b"x")
    assert (tmp_path / "latest.csv").is_symlink()
    assert (tmp_path / "folder" / "out.csv").read_text() == "x"


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


STRANGE = ["a b.jpg", "a,b.jpg", 'a"b.jpg', "a\nb.jpg", "a\r\nb.jpg", "a\rb.jpg", "고양이.jpg", "=1+1.jpg"]


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


def test_of_equal_probabilities_the_first_class_is_the_likeliest_whatever_k() -> None:
    even = np.full(300, 1 / 300, np.float32)
    names = tuple(map(str, range(300)))
    assert Layout(names).likeliest(even) == Layout(names, 1).likeliest(even) == [0]
    assert Layout(names, 5).likeliest(even) == [0, 1, 2, 3, 4]


def test_more_classes_than_there_are_cannot_be_likeliest() -> None:
    for k in (-1, 4):
        with pytest.raises(ValueError, match=rf"top_k {k} is outside 0 \(all\) .. 3 classes"):
            Layout(CLASS_NAMES, k)


# -- JSON Lines ------------------------------------------------------------------------------------------


def json_rows(tmp_path: Path, rows: Iterable[Row], layout: Layout) -> list[dict[str, Any]]:
    lines = write(tmp_path / "out.jsonl", "jsonl", rows, layout).read_bytes().split(b"\n")
    assert lines.pop() == b""
    return [json.loads(line) for line in lines]


def test_json_lines(tmp_path: Path) -> None:
    good, bad = json_rows(tmp_path, ROWS, Layout(CLASS_NAMES))
    assert good == {
        "path": "a.jpg",
        "label": "green",
        "probability": 0.5,
        "probabilities": {"red": 0.125, "green": 0.5, "blue": 0.375},
        "error": None,
    }
    assert bad == {**dict.fromkeys(good), "path": "b.jpg", "error": "truncated"}


def test_json_lines_of_the_likeliest_classes_with_embeddings(tmp_path: Path) -> None:
    rows = [replace(ROWS[0], embedding=np.array([1.5, -2e-20], np.float32)), ROWS[1]]
    good, bad = json_rows(tmp_path, rows, Layout(CLASS_NAMES, 2, embeddings=True))
    assert good["top"] == [{"label": "green", "probability": 0.5}, {"label": "blue", "probability": 0.375}]
    assert good["embedding"] == [1.5, -2e-20]
    assert (bad["top"], bad["embedding"]) == (None, None)


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
    assert format_of(output) == expected


def test_an_unknown_suffix_is_not_guessed() -> None:
    with pytest.raises(ValueError, match=r"'a.json': '.json' is none of .csv, .jsonl, .* add --format"):
        format_of("a.json")


# -- Kaggle ----------------------------------------------------------------------------------------------


def test_kaggle_has_the_second_class_probability_or_the_class_number(tmp_path: Path) -> None:
    rows = [row_of("test/1.jpg", 0.875, 0.125), row_of("2.b.png", 0.25, 0.75), Row("3.jpg", error="empty")]

    def table(labels: bool) -> list[list[str]]:
        layout = Layout(("cat", "dog"), labels=labels)
        text = write(tmp_path / "out.csv", "kaggle", rows, layout).read_text()
        return [line.split(",") for line in text.splitlines()]

    assert table(labels=False) == [["id", "label"], ["1", "0.125"], ["2.b", "0.75"], ["3", ""]]
    assert table(labels=True) == [["id", "label"], ["1", "0"], ["2.b", "1"], ["3", ""]]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("1", "2", "3"), ["1", "2", "3"]),
        (("01", "2", "10"), ["01", "2", "10"]),
        (("1", "-1"), ["1", "-1"]),
        (("0.0", "1.0"), ["0.0", "1.0"]),
        (("cat", "dog"), ["0", "1"]),
        (("c1", "c2", "c3"), ["0", "1", "2"]),
    ],
)
def test_kaggles_number_is_the_classs_own_where_it_has_one(
    tmp_path: Path, names: tuple[str, ...], labels: list[str]
) -> None:
    rows = [row_of(f"{i}.jpg", *np.eye(len(names))[i]) for i in range(len(names))]
    layout = Layout(names, labels=True)
    text = write(tmp_path / "out.csv", "kaggle", rows, layout).read_text()
    assert [line.split(",")[1] for line in text.splitlines()[1:]] == labels
    assert all(
        f"{number} for {name!r}" in kaggle_meaning(layout)
        for number, name in zip(labels, names, strict=True)
    )


def test_kaggles_probability_is_that_of_the_greater_number(tmp_path: Path) -> None:
    layout = Layout(("1", "-1"))
    text = write(tmp_path / "out.csv", "kaggle", [row_of("a.jpg", 0.75, 0.25)], layout).read_text()
    assert text.splitlines()[1] == "a,0.75"
    assert kaggle_meaning(layout) == "label is the probability of '1'"


def test_kaggle_refuses_what_it_cannot_hold() -> None:
    paths = ["a/1.jpg", "a/2.jpg"]
    check_kaggle(paths, ("a", "b"), labels=False)
    check_kaggle(paths, tuple("abcdefghi"), labels=True)
    with pytest.raises(ValueError, match="the model has 3 classes: add --labels or use --format csv"):
        check_kaggle(paths, ("a", "b", "c"), labels=False)
    with pytest.raises(ValueError, match="'1' is one and 'other' is none: use --format csv"):
        check_kaggle(paths, ("1", "other", "2"), labels=True)
    for twin in ("b/1.jpg", "a/1.png"):
        with pytest.raises(ValueError, match=re.escape(f"'a/1.jpg' and '{twin}' have the same id '1'")):
            check_kaggle([*paths, twin], ("a", "b"), labels=True)

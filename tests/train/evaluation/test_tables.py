"""Tables that a program reads back, and that keep their columns whatever is in a cell."""

import csv
from pathlib import Path

import pytest

from train.evaluation.tables import markdown_table, write_table


def test_a_markdown_table_is_as_wide_as_its_widest_cell() -> None:
    assert markdown_table(["name", "n"], [["a", "100"], ["beagle", "7"]]) == (
        "| name   | n   |\n|--------|-----|\n| a      | 100 |\n| beagle | 7   |\n"
    )


def test_bars_and_line_ends_stay_in_their_cell() -> None:
    assert markdown_table(["x"], [["a|b\nc"]]).splitlines()[2] == "| a\\|b c |"


def test_a_csv_table_reads_back(tmp_path: Path) -> None:
    rows = [{"path": 'a "b",\nc.jpg', "n": 1.5}, {"path": "고양이.jpg", "n": 2}]
    write_table(tmp_path / "t.csv", rows)
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file, quoting=csv.QUOTE_NONNUMERIC)) == rows


def test_an_error_while_writing_keeps_the_older_table(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"a": 1}])
    with pytest.raises(ValueError, match="'b'"):
        write_table(tmp_path / "t.csv", [{"a": 2}, {"b": 3}])
    assert (tmp_path / "t.csv").read_text() == '"a"\n1\n'

"""Columns of a table whose values are images, and others that only resemble them."""

import io
from pathlib import Path

import pytest

from serve.contract.errors import UserError
from serve.contract.image_column import find_image_columns
from serve.contract.image_files import ImageFiles
from serve.contract.tables import read_table


def image_columns(root: Path, header: str, rows: list[str]) -> list[str]:
    table = read_table(io.BytesIO("\n".join([header, *rows]).encode()), "t.csv")
    found = find_image_columns(table, list(table.rows), ImageFiles(str(root / "t.csv"), "train"))
    return [table.columns[i] for i in found]


def test_the_column_of_images_is_the_one_whose_values_are_files(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in (*range(8), "cat", "dog"):
        (tmp_path / "images" / f"{name}.jpg").touch()
    rows = [f"{i},{i}.jpg,{7 - i}.jpg,{'cat' if i % 2 else 'dog'}" for i in range(8)]
    assert image_columns(tmp_path, "id,file,label,kind", rows) == ["file"]
    for numbering in ("", "Unnamed: 0", "Unnamed: 0.1"):
        assert image_columns(tmp_path, f"{numbering},label,other,kind", rows) == ["other"]
    assert set(image_columns(tmp_path, "id,file,other,kind", rows)) == {"file", "other"}
    assert image_columns(tmp_path, "id,x", ["a,b", "c,d"]) == []


def test_numbers_that_may_be_images_of_two_folders_are_no_fault_of_another_column(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for i in range(8):
            (tmp_path / folder / f"{i}.jpg").touch()
    rows = [f"{7 - i},one/{i}.jpg" for i in range(8)]
    assert image_columns(tmp_path, "age,file", rows) == ["file"]
    with pytest.raises(UserError, match=r"'one/7.jpg' .*'two/7.jpg'"):
        image_columns(tmp_path, "age,x", [f"{7 - i},y{i}" for i in range(8)])

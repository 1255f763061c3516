"""Tables as spreadsheets, pandas and scripts write them."""

import io
import json

import pytest

from serve.contract.errors import UserError
from serve.contract.tables import Table, read_table, split_names


def table(text: str, encoding: str = "utf-8") -> Table:
    return read_table(io.BytesIO(text.encode(encoding)), "t.csv")


def cells(found: Table) -> list[list[str]]:
    return [row.cells for row in found.rows]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_separators_and_encodings_are_recognised(mark: str, end: str, encoding: str) -> None:
    lines = [f"id{mark}label", f"1{mark}a b", "", f'2{mark}"c{mark}d"']
    found = table(end.join(lines), encoding)
    assert found.columns == ["id", "label"]
    assert cells(found) == [["1", "a b"], ["2", f"c{mark}d"]]


@pytest.mark.parametrize(
    ("text", "mark", "rows"),
    [
        ("path;note\na,b.jpg;x\nc.jpg;y,z\n", ";", [["a,b.jpg", "x"], ["c.jpg", "y,z"]]),
        ("path,tags\na.jpg,x|y\nb.jpg,y|z\n", ",", [["a.jpg", "x|y"], ["b.jpg", "y|z"]]),
        ("a.jpg;1,5\nb.jpg;2,5\n", ";", [["a.jpg", "1,5"], ["b.jpg", "2,5"]]),
        ("sep=;\npath;label\na,b;c\n", ";", [["a,b", "c"]]),
        ("# of today\n#\npath,label\na,b\n", ",", [["a", "b"]]),
        ("#id,label\na,b\n", ",", [["a", "b"]]),
        ("a b.jpg 3\nc.jpg 4\n", " ", [["a b.jpg", "3"], ["c.jpg", "4"]]),
        ("a b\nc d\n", ",", [["c d"]]),
    ],
)
def test_the_separator_is_the_one_that_fits_every_line(text: str, mark: str, rows: list[list[str]]) -> None:
    found = table(text)
    assert found.delimiter == mark
    assert cells(found) == rows


def test_long_cells_beside_the_label_are_read() -> None:
    mask = "1 5" * 50_000  # of a segmentation contest: longer than the csv module takes by itself
    assert cells(table(f"path,rle,label\na.jpg,{mask},cat\n")) == [["a.jpg", mask, "cat"]]


def test_a_first_line_with_an_image_is_a_row() -> None:
    found = table("cat,a.jpg\ndog,b.jpg\ncat,a.jpg\n")
    assert found.headless
    assert found.columns == ["1", "2"]
    assert [row.line for row in found.rows] == [1, 2, 3]
    assert not table("label,path\ncat,a.jpg\n").headless


def test_json_lines_are_a_table() -> None:
    found = table('{"file_name": "a.jpg", "label": 1}\n\n{"label": null, "file_name": "b.jpg"}\n')
    assert found.columns == ["file_name", "label"]
    assert cells(found) == [["a.jpg", "1"], ["b.jpg", ""]]
    assert cells(table('{"a": 1}\n{"a": 2, "b": "c"}')) == [["1", ""], ["2", "c"]]
    for second in ("[1", '[{"a": 1, "b": 2}]', "1"):
        with pytest.raises(UserError, match=r"t\.csv line 2 .*JSON"):
            cells(table(f'{{"a": 1}}\n{second}\n'))


def test_a_key_that_first_comes_late_is_refused_and_not_dropped() -> None:
    rows = ['{"a": 1}'] * 1000
    with pytest.raises(UserError, match=r"t\.csv line 1001 .*'split'"):
        cells(table("\n".join([*rows, '{"a": 2, "split": "val"}'])))


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_of_json_objects_is_a_table_and_objects_inside_have_columns(indent: int | None) -> None:
    records = [
        {"data": {"image": f"{i}.jpg"}, "value": [{"choices": ["cat"]}], "box": [1, i]} for i in range(2)
    ]
    found = table(json.dumps(records, indent=indent))
    assert found.columns == ["data.image", "value.choices", "box"]
    assert cells(found) == [["0.jpg", "cat", "[1, 0]"], ["1.jpg", "cat", "[1, 1]"]]
    for other in ({"images": [{"id": 1}, {"id": 2}]}, [], [[1]]):
        with pytest.raises(UserError, match=r"t\.csv .*path"):
            table(json.dumps(other, indent=1) if other else "[\n]")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,b\n1,2,3\n", "line 2 has 3 cells for 2"),
        ("a,b\n1,2\na,b\n", "line 3 .*a,b"),
        ("a,b\n1,2\0\n", "line 2 .*NUL"),
    ],
)
def test_a_row_that_would_be_misread_is_refused_with_its_line(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"t\.csv {reason}"):
        cells(table(text))


def test_names_of_columns_may_hold_commas() -> None:
    assert split_names('id, "breed, or mix",x') == ["id", "breed, or mix", "x"]
    assert split_names("") == []

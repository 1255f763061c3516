"""Kaggle's two columns: what they hold, and what they cannot."""

import re
from pathlib import Path

import numpy as np
import pytest
from written import row_of, write

from serve.outputs.kaggle import check_kaggle, label_meaning
from serve.outputs.layout import Layout, Row


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
        f"{number} for {name!r}" in label_meaning(layout)
        for number, name in zip(labels, names, strict=True)
    )


def test_kaggles_probability_is_that_of_the_greater_number(tmp_path: Path) -> None:
    layout = Layout(("1", "-1"))
    text = write(tmp_path / "out.csv", "kaggle", [row_of("a.jpg", 0.75, 0.25)], layout).read_text()
    assert text.splitlines()[1] == "a,0.75"
    assert label_meaning(layout) == "label is the probability of '1'"


def test_kaggle_refuses_what_it_cannot_hold() -> None:
    paths = ["a/1.jpg", "a/2.jpg"]
    check_kaggle(paths, Layout(("a", "b")))
    check_kaggle(paths, Layout(tuple("abcdefghi"), labels=True))
    with pytest.raises(ValueError, match=r"3 classes.*--labels"):
        check_kaggle(paths, Layout(("a", "b", "c")))
    with pytest.raises(ValueError, match=r"'1'.*'other'.*--format csv"):
        check_kaggle(paths, Layout(("1", "other", "2"), labels=True))
    for twin in ("b/1.jpg", "a/1.png"):
        with pytest.raises(ValueError, match=re.escape(f"'a/1.jpg' and '{twin}'")):
            check_kaggle([*paths, twin], Layout(("a", "b"), labels=True))

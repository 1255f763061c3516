"""What a contest's columns hold follows from its sample; what they may hold in two ways is an error."""

from pathlib import Path

import numpy as np
import pytest

from serve.contract.errors import UserError
from serve.outputs.sample import Sample, read_sample
from serve.outputs.submission_columns import Values, find_column

PETS, GRADES, STAGES = ("cat", "dog"), ("0", "1", "2", "3", "4"), ("hispa", "leaf blast", "normal")
P2 = np.array([0.25, 0.75], np.float32)
P3 = np.array([0.125, 0.25, 0.625], np.float32)


def sample_of(folder: Path, text: str) -> Sample:
    (folder / "s.csv").write_text(text)
    return read_sample(str(folder / "s.csv"))


def one_column(folder: Path, values: tuple[str, ...], header: str = "id,label") -> Sample:
    return sample_of(folder, f"{header}\n" + "".join(f"{i},{value}\n" for i, value in enumerate(values)))


@pytest.mark.parametrize(
    ("classes", "shown", "choice", "cells", "unreadable"),
    [
        (PETS, ("0.5", "0.5"), "", "0.75", "0.5"),  # dogs-vs-cats redux
        (PETS, ("0", "0"), "probability", "0.75", "0.5"),  # histopathologic
        (PETS, ("0.0", "0.0"), "", "0.75", "0.5"),
        (PETS, ("0", "0"), "class", "1", "0"),  # dogs-vs-cats
        (PETS, ("1", "2"), "", "2", "1"),
        (PETS, ("0.5", "0.5"), "class", "1", "0"),
        (PETS, ("cat", "cat"), "", "dog", "cat"),
        (PETS, ("", ""), "class", "dog", "cat"),
        (PETS, ("nothing",), "class", "dog", "cat"),
        (("1", "-1"), ("0.5",), "", "0.25", "0.5"),
        (("0", "1"), ("0",), "probability", "0.75", "0.5"),
        (("0", "1"), ("0",), "class", "1", "0"),
    ],
)
def test_of_two_classes(
    tmp_path: Path,
    classes: tuple[str, ...],
    shown: tuple[str, ...],
    choice: Values,
    cells: str,
    unreadable: str,
) -> None:
    column = find_column(one_column(tmp_path, shown), classes, choice)
    assert (column.cells(P2), column.unreadable) == ([cells], [unreadable])


@pytest.mark.parametrize("shown", [("0", "0"), ("0", "1"), ("", "")])
@pytest.mark.parametrize("classes", [PETS, ("0", "1")])
def test_a_probability_or_a_class_has_to_be_chosen(
    tmp_path: Path, classes: tuple[str, ...], shown: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match="--submission-values"):
        find_column(one_column(tmp_path, shown), classes, "")


def test_the_header_names_the_class_whose_probability_it_is(tmp_path: Path) -> None:
    headers = {"id,Cat": "0.25", "id,dog": "0.75", "id,is_it": "0.75", "id,cat_probability": "0.25"}
    headers |= {"id,isDog": "0.75", "id,is_cat": "0.25", "id,cat or dog": "0.75", "id,catalogue": "0.75"}
    for header, cells in headers.items():
        column = find_column(one_column(tmp_path, ("0.5",), header), PETS, "")
        assert column.cells(P2) == [cells]
        assert ("'cat'" in column.meaning) == (cells == "0.25")


@pytest.mark.parametrize(
    ("classes", "shown", "cells"),
    [
        (GRADES[:3], ("0", "0"), "2"),  # aptos
        (("10", "20", "30"), ("10",), "30"),
        (STAGES, ("", ""), "normal"),  # paddy
        (STAGES, ("normal",), "normal"),
        (STAGES, ("Hispa", "Leaf_Blast", "Normal"), "Normal"),
        (STAGES, ("hispa normal", "normal hispa"), "normal leaf blast"),
        (("a", "b", "c"), ("a b c",), "c b a"),
    ],
)
def test_of_more_classes_it_is_a_name_or_a_number(
    tmp_path: Path, classes: tuple[str, ...], shown: tuple[str, ...], cells: str
) -> None:
    column = find_column(one_column(tmp_path, shown), classes, "")
    assert column.cells(P3) == [cells]
    assert column.unreadable[0]


def test_the_numbers_of_two_classes_are_printed(tmp_path: Path) -> None:
    meaning = find_column(one_column(tmp_path, ("0",)), PETS, "class").meaning
    assert all(pair in meaning for pair in ("0 for 'cat'", "1 for 'dog'"))


@pytest.mark.parametrize(("header", "cells"), [("has_cactus", "0.25"), ("no_cactus", "0.75")])
def test_of_two_names_in_a_header_the_longer_one_counts(tmp_path: Path, header: str, cells: str) -> None:
    sample = one_column(tmp_path, ("0.5",), f"id,{header}")
    assert find_column(sample, ("cactus", "no cactus"), "").cells(P2) == [cells]


def test_a_spelling_that_the_sample_does_not_show_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'cat'.*'dog'"):
        find_column(one_column(tmp_path, ("Cat", "Cat")), PETS, "")
    column = find_column(one_column(tmp_path, ("Cat", "Dog")), PETS, "")
    assert column.cells(P2) == ["Dog"]


def test_no_number_is_guessed_for_one_of_more_names(tmp_path: Path) -> None:
    for shown in (("0",), ("0", "2"), ("1", "2", "3")):
        with pytest.raises(UserError, match="'label'"):
            find_column(one_column(tmp_path, shown), STAGES, "")
    assert find_column(one_column(tmp_path, ("0",)), STAGES, "class").cells(P3) == ["normal"]


@pytest.mark.parametrize(
    ("classes", "shown", "choice"),
    [
        (STAGES, ("tiger",), ""),
        (STAGES, ("0.25",), ""),
        (STAGES, ("4",), ""),
        (STAGES, ("1", "2"), ""),
        (STAGES, ("0",), "probability"),
        (("1", "2", "3"), ("0",), ""),
        (PETS, ("0.5", "1.5"), ""),
        (("a_b", "a b"), ("A B",), ""),  # may be either
    ],
)
def test_values_that_fit_no_class_are_refused(
    tmp_path: Path, classes: tuple[str, ...], shown: tuple[str, ...], choice: Values
) -> None:
    with pytest.raises(UserError, match="'label'"):
        find_column(one_column(tmp_path, shown), classes, choice)


def test_a_column_for_each_class_is_found_by_name_and_else_by_spelling(tmp_path: Path) -> None:
    text = "id,Normal,leaf_blast,hispa\n0,0.3,0.3,0.3\n"
    column = find_column(sample_of(tmp_path, text), STAGES, "")
    assert column.cells(P3) == ["0.625", "0.25", "0.125"]
    assert column.unreadable == ["0.33333334"] * 3
    assert "'leaf_blast'" in column.meaning or "'Normal'" in column.meaning


def test_columns_of_zeros_and_ones_have_to_be_chosen(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, "id,hispa,leaf blast,normal\n0,0,1,0\n1,1,0,0\n")
    with pytest.raises(UserError, match="--submission-values"):
        find_column(sample, STAGES, "")
    assert find_column(sample, STAGES, "probability").cells(P3) == ["0.125", "0.25", "0.625"]
    column = find_column(sample, STAGES, "class")
    assert (column.cells(P3), column.unreadable) == (["0", "0", "1"], ["0", "1", "0"])
    zeros = sample_of(tmp_path, "id,hispa,leaf blast,normal\n0,0,0,0\n")
    assert find_column(zeros, STAGES, "").cells(P3) == ["0.125", "0.25", "0.625"]


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ("hispa,normal", ["'leaf blast'"]),
        ("hispa,leaf blast,tiger", ["'tiger'", "'normal'"]),
        ("hispa,leaf blast,normal,tiger", ["'tiger'"]),
        ("hispa,Hispa,leaf blast,normal", []),
    ],
)
def test_columns_and_classes_without_each_other_are_named(
    tmp_path: Path, header: str, named: list[str]
) -> None:
    cells = ",".join(["0.1"] * (header.count(",") + 1))
    with pytest.raises(UserError, match="--sample-submission") as error:
        find_column(sample_of(tmp_path, f"id,{header}\n0,{cells}\n"), STAGES, "")
    assert all(name in str(error.value) for name in named)


def test_two_classes_may_differ_by_spelling_alone(tmp_path: Path) -> None:
    column = find_column(sample_of(tmp_path, "id,a b,a_b\n0,0.5,0.5\n"), ("a_b", "a b"), "")
    assert column.cells(P2) == ["0.75", "0.25"]
    column = find_column(one_column(tmp_path, ("a_b", "a b")), ("a_b", "a b"), "")
    assert column.cells(P2) == ["a b"]

"""One class in two spellings, labels that stand for none, and names that are not UTF-8."""

import os
import string
import unicodedata
from pathlib import Path

import pytest
from train_data import draw, settings

from serve.contract.errors import UserError
from train.data.index import prepare_data
from train.data.labels import describe_counts, missing, unify, warn_of_classes

NFC, NFD = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")


def unified(*labels: str) -> tuple[list[str], list[str]]:
    """(labels, notes)"""
    notes: list[str] = []
    found = unify({f"{i}.png": label for i, label in enumerate(labels)}, "source", notes)
    return list(found.values()), notes


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Cat", "cat"),
        ("CAT", "cat"),
        ("Stra\u00dfe", "STRASSE"),
        ("1", "1.0"),
        ("1", "01"),
        ("1", "1,0"),
        ("0", "-0"),
        ("1", "\uff11"),
        ("100000", "1E+05"),
        ("0.5", "0.50"),
        ("ice_cream", "ice cream"),
        ("ice-cream", "ice cream"),
        ("ice - cream", "ice cream"),
        ("cat", "\uff43\uff41\uff54"),
        ("cat", "cat\u200b"),
        ("cat", "\ufeffcat"),
        ("cat", "c\u0430t"),
        ("don't", "don\u2019t"),
        ("x-ray", "x\u2011ray"),
        (NFC, "Cafe\u0301"),
        (NFC, "caf\u00c3\u00a9"),
        ("cat", "cat "),
        ("cat", "\u00a0cat"),
        ("cat", "cat\n"),
    ],
)
def test_probably_one_class_is_refused(first: str, second: str) -> None:
    with pytest.raises(UserError, match=r"^source: the labels "):
        unified(first, second, "dog")


@pytest.mark.parametrize(
    "names",
    [
        [*string.ascii_letters, *string.digits],  # EMNIST
        ["letter_A", "letter_a", "letter B"],
        ["-1", "0", "1"],
        ["a1", "a01", "a001"],
        ["temp_-5", "temp_5"],
        ["1_11", "11_1"],
        ["1.05", "1.5"],
        ["C", "C++", "C#"],
        ["A", "a_", "aa"],
        ["A+", "A-"],
        ["blackbird", "black bird"],
        ["00042", "00420", "42000"],
        ["1" * 40, "1" * 39 + "2"],
        ["\u0430", "a", "\u03b1", "\uff41"],
        ["a\u00f1o", "ano"],
        ["None", "NA", "unknown"],  # as folders
        ["+", "-", "?", "="],
        ["n01440764", "n01443537"],
    ],
)
def test_different_classes_are_left_alone(names: list[str]) -> None:
    found, notes = unified(*names)
    assert found == [unicodedata.normalize("NFC", name) for name in names]
    assert not [note for note in notes if note.startswith("warning")]


def test_a_refusal_names_both_spellings_and_their_counts() -> None:
    with pytest.raises(ValueError, match=r"'Cat' \(1 images\) and 'cat' \(2 images\)"):
        unified("Cat", "cat", "cat", "dog")


def test_classes_of_a_letter_in_two_cases_are_mentioned() -> None:
    assert ["'A' and 'a', ... (2 pairs)" in note for note in unified("A", "a", "B", "b", "c")[1]] == [True]


def test_unicodes_two_forms_are_one_class_in_a_set_and_between_two(tmp_path: Path) -> None:
    assert unified(NFC, NFD, "dog")[0] == [NFC, NFC, "dog"]
    for i in range(8):
        draw(tmp_path / "images" / NFD / f"{i}.png", 0, i)
        draw(tmp_path / "images" / (NFC if i > 6 else "dog") / f"{i}.png", 1, i)
        draw(tmp_path / "val" / (NFC if i % 2 else "dog") / f"{i}.png", i % 2, 50 + i)
    data = prepare_data(settings(tmp_path, val_data=str(tmp_path / "val")))
    assert data.train.counts() == {NFC: 9, "dog": 7}
    assert data.val.counts() == {NFC: 4, "dog": 4}


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (
            os.fsdecode("\uace0\uc591\uc774".encode("cp949")),
            r"UTF-8.*'\uace0\uc591\uc774' in cp949.*convmv",
        ),
        (os.fsdecode(b"caf\xe9"), r"b'caf\\xe9' .*UTF-8.*'caf\u00e9' in cp1252 .*convmv"),
        ("caf\ufffd", r"'caf\ufffd'.*U\+FFFD"),
    ],
)
def test_a_name_that_is_no_text_is_no_class(label: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        unified(label, "dog")


WITHOUT = [
    "no_label",
    "No Label",
    "unlabeled",
    "Unlabelled",
    "not labelled",
    "not-labeled",
    "missing_label",
]


@pytest.mark.parametrize("name", ["nan", "NaN", "<NA>", "#N/A", *WITHOUT])
def test_a_folder_called_as_missing_labels_are_is_warned_of(name: str) -> None:
    (warning,) = unified(name, "dog")[1]
    assert warning.startswith("warning: source: ")
    assert repr(name) in warning


@pytest.mark.parametrize("name", ["caf\u00c3\u00a9", "caf\u251c\u2310"])
def test_a_name_that_was_decoded_wrongly_is_warned_of(name: str) -> None:
    (warning,) = unified(name, "dog")[1]
    assert warning.startswith("warning: source: ")
    assert repr(name) in warning
    assert repr(NFC) in warning


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["cat", "", " ", "nan", "NaN", "None", "null", "NA", "N/A", "?", "-", "--", "<NA>"], {"cat"}),
        (["none", "unknown", "na", "nano", "Nan"], {"none", "unknown", "na", "nano", "Nan"}),
        (["0", "1", "-", "+", "?"], {"0", "1", "-", "+", "?"}),  # signs
        (["0", "1", "-"], {"0", "1"}),
    ],
)
def test_labels_of_a_table_that_stand_for_none(labels: list[str], expected: set[str]) -> None:
    assert set(labels) - missing(labels) == expected


def test_counts_of_many_classes_are_a_line_with_the_smallest() -> None:
    assert describe_counts({"cat": 3, "dog": 4}) == "'cat' 3, 'dog' 4"
    assert describe_counts(dict.fromkeys(map(str, range(120)), 4)) == "120 classes, 4 in each"
    counts = {f"breed {i}": 100 + (7 * i) % 60 for i in range(60)}
    line = describe_counts(counts)
    assert len(line) < 160
    for number in ("60", "100", "159", "129.5", "'breed 0' 100", "'breed 43' 101", "'breed 26' 102"):
        assert number in line


def test_classes_that_lack_something_share_one_line() -> None:
    assert warn_of_classes([], "no image") == []
    assert warn_of_classes(["a"], "no image") == ["warning: class 'a' has no image"]
    (line,) = warn_of_classes([f"c{i}" for i in range(1000)], "no image")
    assert "1000" in line
    assert "'c9'" in line
    assert len(line) < 160

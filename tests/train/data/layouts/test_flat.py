"""Labels in the names of files: copies have the label of the original, and numbers are warned of."""

from pathlib import Path

import pytest
from tar_files import make_tar

from serve.contract.errors import UserError
from train.data.layouts.registry import find_labels

PLAIN = [f"{name}.{i}.jpg" for name in ("cat", "dog") for i in range(4)]


def read(folder: Path, *names: str) -> tuple[list[str], list[str]]:
    """(labels in the order of the names, warnings)"""
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    found = find_labels(folder, "auto")
    packed = find_labels(make_tar(folder.with_suffix(".tar"), dict.fromkeys(names, b"")), "auto")
    assert [packed.labels[f"{folder.name}.tar/{name}"] for name in names] == [
        found.labels[n] for n in names
    ]
    assert packed.warnings == found.warnings
    return [found.labels[name] for name in names], found.warnings


@pytest.mark.parametrize(
    "copies",
    [
        ["cat.0 (1).jpg"],
        ["cat.3 2.jpg"],
        ["cat.0 (1).jpg", "cat.0 (2).jpg", "cat.0 (3).jpg"],
        ["cat.0 (1).jpg", "cat.0 (1) (1).jpg"],
        ["cat.0 - Copy.jpg"],
        ["cat.0 copy 2.jpg", "cat.1 - Copy (2).jpg"],
    ],
)
def test_a_numbered_copy_has_the_label_of_the_original(tmp_path: Path, copies: list[str]) -> None:
    labels, (warning,) = read(tmp_path / "set", *PLAIN, *copies)
    assert labels == ["cat"] * 4 + ["dog"] * 4 + ["cat"] * len(copies)
    assert warning.startswith(f"{len(copies)} ")
    assert repr(copies[0]) in warning


def test_a_name_like_a_copys_without_the_original_is_a_class_and_warned_of(tmp_path: Path) -> None:
    labels, (warning,) = read(tmp_path / "set", *PLAIN, "cat.9 (1).jpg", "cat.8 (1).jpg")
    assert set(labels) == {"cat", "cat.8", "cat.9", "dog"}
    assert "'cat.8'" in warning
    assert warning.startswith("2 ")


def test_a_class_that_is_another_one_with_a_number_is_warned_of(tmp_path: Path) -> None:
    names = [f"{name}-{i}.jpg" for name in ("DC-9", "DC-9-30") for i in range(5)]
    labels, (warning,) = read(tmp_path / "set", *names)
    assert set(labels) == {"DC-9", "DC-9-30"}
    assert "'DC-9-30'" in warning
    assert warning.startswith("1 ")
    names = [f"Boeing{kind} ({i}).jpg" for kind in ("", " 737") for i in range(5)]
    labels, (warning,) = read(tmp_path / "other", *names)
    assert set(labels) == {"Boeing", "Boeing 737"}
    assert "'Boeing 737'" in warning


@pytest.mark.parametrize("kinds", [("model 3", "model 5"), ("f_16", "f_18"), ("0", "1"), ("17", "cat")])
def test_classes_with_numbers_of_their_own_stay_classes(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    labels, warnings = read(tmp_path / "set", *(f"{kind} ({i}).jpg" for kind in kinds for i in range(4)))
    assert set(labels) == set(kinds)
    assert warnings == []


def test_classes_that_are_all_long_numbers_are_warned_of(tmp_path: Path) -> None:
    labels, (warning,) = read(
        tmp_path / "set", *(f"0000000{patient}_00{i}.png" for patient in range(3) for i in range(2))
    )
    assert len(set(labels)) == 3
    assert "'00000000'" in warning
    assert "label file" in warning


@pytest.mark.parametrize(
    "names",
    [("IMG_{}.jpg", "DSC_{}.jpg"), ("Train_{}.jpg", "Test_{}.jpg"), ("train{}_4.png", "val{}_2.png")],
)
def test_names_of_cameras_and_parts_are_no_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    files = [name.format(i) for name in names for i in range(4)]
    for name in files:
        (tmp_path / name).touch()
    for source in (tmp_path, make_tar(tmp_path / "set.tar", dict.fromkeys(files, b""))):
        with pytest.raises(UserError, match="no label"):
            find_labels(source, "flat" if source.is_dir() else "tar")

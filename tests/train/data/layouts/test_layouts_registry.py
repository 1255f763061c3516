"""A folder that holds a label file beside its images."""

import shlex
from pathlib import Path

import pytest
from contest_layouts import LAYOUTS, labelled, write

from serve.contract.errors import UserError
from train.data.layouts.registry import find_labels


@pytest.mark.parametrize("name", ["dog_breed", "plant_pathology_2020", "hugging_face_jsonl", "paddy"])
def test_the_label_file_of_a_folder_that_a_contest_unpacks_is_named(tmp_path: Path, name: str) -> None:
    source, labels = LAYOUTS[name](tmp_path / "a set")
    with pytest.raises(UserError) as caught:
        find_labels(source.parent, "auto")
    words = shlex.split(str(caught.value).replace(",", " ").replace(". ", " "))
    given = words[words.index("--data") + 1]
    assert given == str(source)
    assert find_labels(Path(given), "auto").labels == labels


def test_a_label_file_with_columns_to_name_is_named_with_them(tmp_path: Path) -> None:
    source, _ = LAYOUTS["dog_breed"](tmp_path)
    lines = source.read_text().split()
    colours = ["colour", *("red" if i % 2 else "grey" for i in range(len(lines) - 1))]
    source.write_text("\n".join(f"{line},{colour}" for line, colour in zip(lines, colours, strict=True)))
    with pytest.raises(UserError, match=r"--data .*labels\.csv.*--columns id,breed"):
        find_labels(tmp_path, "auto")


@pytest.mark.parametrize(
    ("row", "reason"),
    [("000000ab,", "empty"), ("000000ab,beagle,x", "3 cells"), ('000000ab,"beagle', "quote")],
)
def test_a_label_file_with_a_faulty_row_is_named_with_its_line_if_it_names_images(
    tmp_path: Path, row: str, reason: str
) -> None:
    source, _ = LAYOUTS["dog_breed"](tmp_path)
    text = f"{source.read_text()}{row}\n"
    source.write_text(text)
    with pytest.raises(UserError, match=rf"--data .*labels\.csv line 14.*{reason}"):
        find_labels(tmp_path, "auto")
    source.write_text(text.replace("ab,", "xy,"))
    with pytest.raises(UserError) as caught:
        find_labels(tmp_path, "auto")
    assert "labels.csv" not in str(caught.value)


def test_folders_of_classes_with_a_label_file_that_agrees_are_classes(tmp_path: Path) -> None:
    labels = {f"{name}/{i}.png": name for name in ("cat", "dog") for i in range(6)}
    for path in labels:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    write(tmp_path / "labels.csv", "file,kind", [(path, label.title()) for path, label in labels.items()])
    assert find_labels(tmp_path, "auto").labels == labels
    cameras = labelled("{}", ("A", "B")).values()
    write(tmp_path / "labels.csv", "file,kind", zip(labels, cameras, strict=True))
    with pytest.raises(UserError, match=r"labels\.csv.*--data-format folders"):
        find_labels(tmp_path, "auto")
    assert find_labels(tmp_path, "folders").labels == labels


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("pathmnist.npz", "label file"),
        ("a.tfrecord-00000-of-00002", "label file"),
        ("a.jpg", "folder"),
    ],
)
def test_a_file_of_another_kind_is_named_with_the_cure(tmp_path: Path, name: str, cure: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xd8" if name == "a.jpg" else b"PK\x03\x04")
    with pytest.raises(UserError, match=cure):
        find_labels(tmp_path / name, "auto")


def test_a_label_file_that_is_not_used_is_named(tmp_path: Path) -> None:
    source, _ = LAYOUTS["ham10000"](tmp_path)
    with pytest.raises(UserError, match=r"--data .*HAM10000_metadata\.csv.*_part_1"):
        find_labels(tmp_path, "auto")
    for folder, name in zip(sorted(tmp_path.glob("HAM*_part_?")), ("cat", "dog"), strict=True):
        folder.rename(tmp_path / name)
    (warning,) = find_labels(tmp_path, "auto").warnings
    assert f"--data {source}" in warning
    assert "--columns image_id,dx" in warning

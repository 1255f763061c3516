"""Label files: their columns, rows, checks and soft labels; more are in test_index.py."""

import csv
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from train_data import flat_set, settings

from serve.contract.errors import UserError
from train.data.index import prepare_data
from train.data.labels import LabelledPaths
from train.data.layouts.label_file import read, write_label_file
from train.data.layouts.soft_labels import soft_targets


def write(path: Path, *rows: str, header: str = "path,label,probability_cat,probability_dog") -> Path:
    path.write_text("\n".join([header, *rows]), encoding="utf-8")
    return path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_probabilities_are_targets_and_images_without_keep_their_label(tmp_path: Path) -> None:
    flat_set(tmp_path / "images")
    rows = [f"images/{name}.{i}.png,{name},," for name in ("cat", "dog") for i in range(5)]
    file = write(tmp_path / "m.csv", *rows, "images/cat.5.png,cat,0.75,0.25")
    val = write(tmp_path / "v.csv", "images/dog.5.png,dog", header="path,label")
    data = prepare_data(settings(tmp_path, data=str(file), val_data=str(val)))
    assert data.train.targets is not None
    assert data.val.targets is None
    targets = dict(zip(data.train.paths, data.train.targets.tolist(), strict=True))
    assert targets["images/cat.5.png"] == [0.75, 0.25]
    assert targets["images/cat.0.png"] == [1.0, 0.0]
    assert targets["images/dog.0.png"] == [0.0, 1.0]
    write(tmp_path / "m.csv", *rows, "images/cat.5.png,cat,0.5,0.5")
    other = prepare_data(settings(tmp_path, data=str(file), val_data=str(val)))
    assert other.digest != data.digest, "another target is another data set"


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            {"cat": 0.5, "fox": 0.5},
            r"probability_CLASS .*\['cat', 'fox'\].*\['cat', 'dog'\]",
        ),
        ({"cat": 0.5, "dog": 0.1}, r"m.csv: .*'a', \[0\.5, 0\.1"),
        ({"cat": 1.5, "dog": -0.5}, r"'a', \[1\.5, -0\.5\]"),
        ({"cat": float("nan"), "dog": 1.0}, r"'a', \[nan, 1\.0\]"),
    ],
)
def test_what_is_no_distribution_over_the_classes_is_refused(cells: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soft_targets(
            ["a"], LabelledPaths(Path(), {"a": "cat"}, "", [], {"a": cells}), ("cat", "dog"), "m.csv"
        )


def test_a_cell_that_is_no_number_is_named_with_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "m.csv", "a.png,cat,0.5,0.5", "b.png,cat,0.5,much")
    with pytest.raises(ValueError, match=r"m.csv line 3: .*much"):
        read(file)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    images = [str(tmp_path / "a" / "x.png"), 'quote".png', "line\nbreak.png"]
    touch(tmp_path, *images)
    soft = {images[1]: np.array([0.123456789, 0.876543211])}
    write_label_file(tmp_path / "m.csv", images, ["cat", "dog", "cat"], soft, ("cat", "dog"))
    found = read(tmp_path / "m.csv")
    assert found.labels == dict(zip(images, ["cat", "dog", "cat"], strict=True))
    assert found.probabilities == {images[1]: {"cat": 0.123456789, "dog": 0.876543211}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "path,label.*empty"),
        ("path,label,split\na.jpg,cat,val\nb.jpg,dog,best\n", "line 3: .*column split.*'best'"),
        ("path,label\na.jpg,\"['cat', 'dog']\"\nb.jpg,['dog']\n", "line 2: .*several"),
        ('path,label\na.jpg,"[0, 3]"\nb.jpg,0\n', "line 2: .*several"),
        ("path,label\na.jpg,cat\nb.jpg,[]\n", "line 3: .*several"),
        ("path,label\na.jpg,cat\nb.jpg,dog\nc.jpg,\\N\n", "line 4: "),
        ("path,label\ns3://bucket/a.jpg,cat\n", "s3://bucket/a.jpg.* URL"),
        ("id,breed\na,cat\nb,dog\n", "path,label.*'id' 'a', 'breed' 'cat'"),
        ("path,label\na.jpg,cat\nb,c.jpg,dog\n", "line 3 has 3 cells for 2 columns"),
        ("path,label,label\na.jpg,cat,dog\n", "column label twice"),
        ("path,label\na.jpg,cat\nb.jpg,nan\nc.jpg,nan\n", r"line 3: 'nan' .* \(2 of 3 images\)"),
        ("path,label\na.jpg,cat\nb.jpg, \n", "line 3: .*empty"),
        ("path,label,x\na.jpg,cat,\nb,c.jpg,dog\n", "line 3: .*'c.jpg'"),
        ("path,label\na.jpg,cat\npath,label\nb.jpg,dog\n", "line 3 .*'path,label'"),
        ("Path, Label\na.jpg,cat\n\ufeffPath, Label\nb.jpg,dog\n", "line 3 .*Path, Label"),
        ("path,label\na.jpg,cat\nb.jpg,c\0at\n", r"line 3 .*NUL.*'b.jpg,c\\x00at'"),
        ("path,label\na.jpg,cat\n ,dog\n", "line 3: .*empty"),
        ('path,label\na.jpg,cat\nb.jpg,"dog\nc.jpg,cat\n', "line 3: unexpected end of data"),
        ("path,label\na.jpg,cat\n./a.jpg,dog\n", "line 3: 'a.jpg' .*twice.*'cat'.*'dog'"),
        ("path,label\na.jpg,cat\nx/../a.jpg,dog\n", "line 3: 'a.jpg' .*twice"),
    ],
)
def test_a_file_that_would_be_misread_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "images.csv").write_text(text)
    with pytest.raises((ValueError, csv.Error), match=reason):
        read(tmp_path / "images.csv")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize(
    "lines",
    [
        ["path,label", "a.jpg,cat", "b/c.jpg,caf\u00e9"],
        ["Path,LABEL", "a.jpg,cat", "b/c.jpg,caf\u00e9"],
        ["label, path", "cat, a.jpg", 'caf\u00e9, "b/c.jpg"'],
        [",path,label,", "0,a.jpg,cat,", ",,,", "1,b/c.jpg,caf\u00e9"],
    ],
    ids=["plain", "capitals", "spaces", "index and empty cells"],
)
def test_what_spreadsheets_write_is_read(tmp_path: Path, lines: list[str], encoding: str) -> None:
    touch(tmp_path, "a.jpg", "b/c.jpg")
    (tmp_path / "m.csv").write_bytes("\r\n".join(lines).encode(encoding))
    assert read(tmp_path / "m.csv").labels == {"a.jpg": "cat", "b/c.jpg": "caf\u00e9"}


def test_a_repeated_row_counts_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    paths = ["a.jpg", "./a.jpg", str(tmp_path / "a.jpg"), "b//../a.jpg", "a.jpg", "b.jpg"]
    file = write(tmp_path / "m.csv", *(f"{path},cat,0.5,0.5" for path in paths))
    found = read(file)
    assert found.labels == {"a.jpg": "cat", "b.jpg": "cat"}
    assert list(found.probabilities) == ["a.jpg", "b.jpg"]
    assert "4 rows" in found.layout
    write(file, "a.jpg,cat,0.5,0.5", "./a.jpg,cat,0.6,0.4")
    with pytest.raises(ValueError, match=r"line 3: 'a.jpg' .*twice.*0\.5.*0\.6"):
        read(file)


def test_a_class_that_is_called_as_missing_labels_are_is_written_in_quotes(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    labels = {"a.jpg": "None", "b.jpg": "-", "c.jpg": "cat"}
    write_label_file(tmp_path / "m.csv", list(labels), list(labels.values()))
    assert read(tmp_path / "m.csv").labels == labels
    write(tmp_path / "m.csv", 'a.jpg,"None"', "b.jpg,cat", "c.jpg,nan", header="path,label")
    with pytest.raises(ValueError, match=r"line 4: 'nan' .*double quotes"):
        read(tmp_path / "m.csv")


def test_a_path_that_is_not_utf8_is_kept_as_it_is(tmp_path: Path) -> None:
    touch(tmp_path, os.fsdecode(b"caf\xe9.jpg"))
    (tmp_path / "m.csv").write_bytes(b"path,label\ncaf\xe9.jpg,cat\n")
    assert list(read(tmp_path / "m.csv").labels) == [os.fsdecode(b"caf\xe9.jpg")]


@pytest.mark.parametrize(("label", "encoding"), [("\uace0\uc591\uc774", "cp949"), ("caf\u00e9", "latin-1")])
def test_an_encoding_is_named_with_the_command_that_converts(
    tmp_path: Path, label: str, encoding: str
) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    file = tmp_path / "my labels.csv"
    file.write_bytes(f"path,label\na.jpg,dog\nb.jpg,{label}\n".encode(encoding))
    with pytest.raises(UserError, match=f"my labels.csv line 3: .*UTF-8.*{label}.*{encoding}") as caught:
        read(file)
    subprocess.run(str(caught.value).rpartition("run: ")[2], shell=True, check=True)
    assert read(tmp_path / "my labels.new.csv").labels["b.jpg"] == label


def test_images_that_are_lost_are_left_to_the_scan_unless_most_are(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.jpg", "2.jpg", "3.jpg")
    write(tmp_path / "m.csv", "1.jpg,cat", "2.jpg,dog", "3.jpg,dog", header="path,label")
    assert list(read(tmp_path / "m.csv").labels) == ["1.jpg", "2.jpg", "3.jpg"]
    write(tmp_path / "m.csv", "7.jpg,cat", "2.jpg,dog", "8.jpg,dog", header="path,label")
    with pytest.raises(UserError, match=f"'7.jpg'.*'{tmp_path}'"):
        read(tmp_path / "m.csv")


def test_combined_labels_and_parts_in_one_are_warned_of(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.jpg", "train/b.jpg", "test/c.jpg", "test/d.jpg")
    rows = ["train/a.jpg,Edema", "train/b.jpg,Edema|Mass", "test/c.jpg,No Finding"]
    combined, parts = read(write(tmp_path / "m.csv", *rows, header="path,label")).warnings
    assert "'Edema|Mass'" in combined
    assert "'test', 'train'" in parts
    rows = ["train/a.jpg,big cat", "train/b.jpg,cat"]
    assert read(write(tmp_path / "m.csv", *rows, header="path,label")).warnings == []


def test_labels_that_contradict_their_soft_labels_are_named_with_the_way_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    file = write(tmp_path / "m.csv", "a.jpg,cat,0.9,0.1", "b.jpg,cat,0.1,0.9")
    assert "soft labels: 2 images" in read(file).layout
    (warning,) = read(file).warnings
    assert "'cat' of 'b.jpg'" in warning
    assert read(file, "--val-data").warnings == []
    served = "path,label,probability,probability_cat,probability_dog,error"
    write(file, "a.jpg,cat,0.9,0.9,0.1,", "b.jpg,cat,0.9,0.1,0.9,", header=served)
    with pytest.raises(UserError, match=r"m\.csv: .*'b\.jpg'.*empty their cells"):
        read(file)
    write(file, "a.jpg,cat,0.9,0.9,0.1,", "b.jpg,cat,0.9,,,", header=served)
    assert read(file).probabilities == {"a.jpg": {"cat": 0.9, "dog": 0.1}}
    assert read(file).warnings == []

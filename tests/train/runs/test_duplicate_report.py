"""The report of duplicates: a row for each image that is there more than once, and a picture of pairs."""

import csv
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from train_data import settings

from train.data.index import Data, prepare_data
from train.data.sample import draw_face
from train.runs.duplicate_report import contradictory, list_duplicates, save_duplicates


def faces(root: Path, per_class: int = 8) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for label in ("cat", "dog"):
        for i in range(per_class):
            draw_face(label, np.random.default_rng([i, label == "dog"])).save(root / f"{label}.{i}.png")
    return root


def again(file: Path, copy: str, quality: int = 60) -> None:
    with Image.open(file) as image:
        image.save(file.parent / copy, quality=quality)


def prepared(tmp_path: Path, **changes: object) -> Data:
    return prepare_data(settings(tmp_path, **changes))


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "duplicates.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_without_duplicates_there_is_no_report(tmp_path: Path) -> None:
    faces(tmp_path / "images")
    groups = list_duplicates(prepared(tmp_path))
    save_duplicates(tmp_path, groups)
    assert groups == []
    assert not (tmp_path / "duplicates.csv").exists()
    assert not (tmp_path / "figures").exists()


def test_identical_and_near_duplicates_are_listed_with_side_and_label(tmp_path: Path) -> None:
    root = faces(tmp_path / "images")
    shutil.copy(root / "cat.0.png", root / "cat.100.png")
    again(root / "cat.0.png", "cat.101.jpg")
    again(root / "dog.1.png", "dog.102.jpg", quality=20)
    again(root / "dog.2.png", "cat.103.jpg")
    data = prepared(tmp_path)
    save_duplicates(tmp_path, list_duplicates(data))
    rows = rows_of(tmp_path)
    assert {row["path"]: (row["label"], row["kind"], row["contradiction"]) for row in rows} == {
        "dog.2.png": ("dog", "near", "1"),
        "cat.103.jpg": ("cat", "near", "1"),
        "cat.0.png": ("cat", "identical", "0"),
        "cat.100.png": ("cat", "identical", "0"),
        "cat.101.jpg": ("cat", "near", "0"),
        "dog.1.png": ("dog", "near", "0"),
        "dog.102.jpg": ("dog", "near", "0"),
    }
    assert {row["group"] for row in rows} == {"1", "2", "3"}
    assert {row["path"] for row in rows if row["group"] == "1"} == {"dog.2.png", "cat.103.jpg"}
    for number in "123":
        assert len({row["side"] for row in rows if row["group"] == number}) == 1
        assert max(float(row["similarity"]) for row in rows if row["group"] == number) == 1
    assert {row["side"] for row in rows if row["contradiction"] == "1"} == {"train"}
    assert 0.7 <= min(float(row["similarity"]) for row in rows) < 1


def test_more_groups_than_the_picture_has_room_for_are_drawn(tmp_path: Path) -> None:
    root = faces(tmp_path / "images", per_class=15)
    for i in range(15):
        for label in ("cat", "dog"):
            again(root / f"{label}.{i}.png", f"{label}.{100 + i}.jpg")
    groups = list_duplicates(prepared(tmp_path))
    assert len(groups) == 30
    save_duplicates(tmp_path, groups)
    with Image.open(tmp_path / "figures" / "duplicates.png") as image:
        image.load()
        assert image.width > 1000
        assert np.asarray(image.convert("L")).std() > 10


def test_validation_images_of_their_own_are_listed_beside_their_copies(tmp_path: Path) -> None:
    root = faces(tmp_path / "images")
    val = faces(tmp_path / "val", per_class=1)
    for label in ("cat", "dog"):
        (val / f"{label}.0.png").rename(val / f"{label}.50.png")
    again(root / "cat.3.png", "../val/cat.3.jpg")
    data = prepared(tmp_path, val_data=str(val))
    found = {frozenset((row.side, row.path, row.kind) for row in rows) for rows in list_duplicates(data)}
    assert found == {
        frozenset({("train", "cat.0.png", "identical"), ("val", "cat.50.png", "identical")}),
        frozenset({("train", "dog.0.png", "identical"), ("val", "dog.50.png", "identical")}),
        frozenset({("train", "cat.3.png", "near"), ("val", "cat.3.jpg", "near")}),
    }
    assert not any(contradictory(rows) for rows in list_duplicates(data))

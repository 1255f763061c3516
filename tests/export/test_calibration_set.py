"""Calibration sees training images only: no validation image, whatever its name, and no unreadable file."""

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tar_files import make_tar
from train_data import draw

from export.calibration_set import training_pixels
from export.validation_images import ValidationImages
from serve.contract.images import load_image
from serve.contract.preprocess import Preprocess

PREPROCESS = Preprocess("squash", 8, 8)


def checkpoint(source: Path) -> dict[str, Any]:
    config = {
        "data": str(source),
        "data_format": "auto",
        "columns": "",
        "exclude": "",
        "max_megapixels": 80,
    }
    return {"preprocess": PREPROCESS.to_dict(), "config": config}


def pixels_of(path: Path) -> bytes:
    return PREPROCESS(load_image(path.read_bytes())).tobytes()


@pytest.fixture
def flat(tmp_path: Path) -> tuple[Path, ValidationImages]:
    """20 images, 5 of them for validation; every one is different."""
    root = tmp_path / "images"
    for i in range(20):
        draw(root / f"{'cat' if i % 2 else 'dog'}.{i}.png", i % 2, i)
    paths = sorted(p.name for p in root.iterdir())[::4]
    return root, ValidationImages(root, paths, ["cat"] * 5, is_whole_set=True)


def test_validation_images_are_never_taken_even_as_copies(flat: tuple[Path, ValidationImages]) -> None:
    root, validation = flat
    for i, path in enumerate(validation.paths):
        shutil.copy(root / path, root / f"cat.{100 + i}.png")
    taken = training_pixels(checkpoint(root), validation, 1000)
    assert taken.shape == (15, 8, 8, 3)
    expected = {pixels_of(p) for p in root.iterdir()} - {pixels_of(root / p) for p in validation.paths}
    assert {image.tobytes() for image in taken} == expected


def test_as_many_as_asked_for_and_the_same_each_time(flat: tuple[Path, ValidationImages]) -> None:
    root, validation = flat
    first = training_pixels(checkpoint(root), validation, 9)
    assert len(first) == 9
    np.testing.assert_array_equal(training_pixels(checkpoint(root), validation, 9), first)


def test_unreadable_files_and_litter_are_passed_over(flat: tuple[Path, ValidationImages]) -> None:
    root, validation = flat
    (root / "cat.50.png").write_bytes(b"no image")
    (root / "cat.51.png").write_bytes(b"")
    draw(root / "._cat.52.png", 3, 52)
    assert len(training_pixels(checkpoint(root), validation, 1000)) == 15


def test_class_folders_and_manifests_are_read_like_training_does(
    flat: tuple[Path, ValidationImages], tmp_path: Path
) -> None:
    root, validation = flat
    expected = {image.tobytes() for image in training_pixels(checkpoint(root), validation, 1000)}
    for path in root.iterdir():
        target = tmp_path / "folders" / path.name.split(".")[0] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    with (tmp_path / "manifest.csv").open("w", newline="", encoding="utf-16") as file:
        csv.writer(file).writerows(
            [["path", "label"], *(["images/" + p.name, "x"] for p in root.iterdir())]
        )
    for source in (tmp_path / "folders", tmp_path / "manifest.csv"):
        taken = training_pixels(checkpoint(source), validation, 1000)
        assert {image.tobytes() for image in taken} == expected


def test_images_that_are_not_there_or_too_few_say_so(
    flat: tuple[Path, ValidationImages], tmp_path: Path
) -> None:
    root, validation = flat
    with pytest.raises(ValueError, match=r"'nowhere'.*--training-images"):
        training_pixels(checkpoint(Path("nowhere")), validation, 9)
    assert len(training_pixels(checkpoint(Path("nowhere")), validation, 9, source=root)) == 9
    few = tmp_path / "few"
    draw(few / "cat.1.png", 0, 1000)
    with pytest.raises(ValueError, match=r" 1 readable .* 8 "):
        training_pixels(checkpoint(few), validation, 9)


def test_masks_beside_images_and_what_training_left_out_are_not_taken(
    flat: tuple[Path, ValidationImages], tmp_path: Path
) -> None:
    root, validation = flat
    folders = tmp_path / "folders"
    for path in root.iterdir():
        label, number, _ = path.name.split(".")
        (folders / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folders / label / f"{number}.png")
        with Image.open(path) as image:
            mask = Image.new("L", image.size)
        mask.paste(255, (0, 0, mask.width // 2, int(number) + 1))
        mask.save(folders / label / f"{number}_mask.png")
    assert len(training_pixels(checkpoint(folders), validation, 1000)) == 15
    left_out = next(path for path in sorted(root.iterdir()) if path.name not in validation.paths)
    (tmp_path / "bad.csv").write_text(f"path\n{left_out.name}\n")
    settings = checkpoint(root)
    settings["config"]["exclude"] = str(tmp_path / "bad.csv")
    taken = training_pixels(settings, validation, 1000)
    assert pixels_of(left_out) not in {image.tobytes() for image in taken}
    assert len(taken) == 14


def test_masks_in_shards_are_not_taken(flat: tuple[Path, ValidationImages], tmp_path: Path) -> None:
    root, validation = flat
    members = {}
    for i, path in enumerate(sorted(root.iterdir())):
        members |= {f"{i}.png": path.read_bytes(), f"{i}.cls": b"1"}
        members[f"{i}.seg.png"] = draw(tmp_path / "masks" / f"{i}.png", 3, i).read_bytes()
    assert len(training_pixels(checkpoint(make_tar(tmp_path / "x.tar", members)), validation, 1000)) == 15

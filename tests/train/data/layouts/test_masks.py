"""Masks and thumbnails beside images are found by their pixels; classes that are called so are not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from train_data import draw

from train.data.layouts.masks import find_derived


def draw_mask(path: Path, seed: int = 0, mode: str = "L") -> Path:
    """White on black, in a JPEG with its noise."""
    levels = np.zeros((48, 40), np.uint8)
    levels[5 + seed : 25 + seed, 8:30] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).convert(mode).save(path)
    return path


def derived(root: Path) -> dict[str, int]:
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*.*"))
    return {place: len(images) for place, images in find_derived(root, paths).items()}


@pytest.mark.parametrize(
    ("image", "mask", "place"),
    [
        ("images/{}.jpg", "annotations/trimaps/{}.png", "annotations/trimaps"),
        ("cat/{}.jpg", "masks/cat/{}.png", "masks/cat"),
        ("cat/images/{}.png", "cat/masks/{}.png", "cat/masks"),
        ("cat/cat ({}).png", "cat/cat ({})_mask.png", "cat/*_mask"),
        ("cat/cat ({}).png", "cat/cat ({})_mask_1.png", "cat/*_mask"),
        ("x/{}.jpg", "x-GT/{}.jpg", "x-GT"),
        ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", "SegmentationClass"),
        ("good/{}.png", "ground_truth/broken/{}_mask.png", "ground_truth/broken"),
    ],
)
@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_masks_are_found(tmp_path: Path, image: str, mask: str, place: str, mode: str) -> None:
    for i in range(4):
        draw(tmp_path / image.format(i), 0, i)
        draw_mask(tmp_path / mask.format(i), i, "L" if mode == "P" and mask.endswith("jpg") else mode)
    assert derived(tmp_path) == {place: 4}


def thumbnail_of(image: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(image) as picture:
        picture.resize((12, 10)).save(path)


def test_thumbnails_are_found(tmp_path: Path) -> None:
    for i in range(4):
        gradient = np.linspace(0, 200 + 10 * i, 60 * 50).reshape(50, 60).astype(np.uint8)
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.fromarray(gradient).convert("RGB").save(tmp_path / "cat" / f"{i}.png")
        thumbnail_of(tmp_path / "cat" / f"{i}.png", tmp_path / "thumbs" / f"{i}.png")
    assert derived(tmp_path) == {"thumbs": 4}


def photographs(root: Path) -> None:
    for name in ("mask", "no_mask"):
        for i in range(4):
            draw(root / name / f"{i}.jpg", name == "mask", i)


def pictograms(root: Path) -> None:
    for name in ("mask", "hat"):
        for i in range(4):
            draw_mask(root / name / f"{i}.png", i if name == "mask" else i + 15)


def without_namesakes(root: Path) -> None:
    for i in range(4):
        draw_mask(root / "label" / f"a{i}.png", i)
        draw(root / "bottle" / f"b{i}.png", 0, i)


def people_in_masks(root: Path) -> None:
    for i in range(4):
        draw(root / "ann" / f"{i}.jpg", 0, i)
        draw(root / "ann" / f"{i}_mask.jpg", 1, 50 + i)


def a_camera_that_stands_still(root: Path) -> None:
    for seed, name in enumerate(("label", "missing")):
        (root / name).mkdir()
        for i in range(4):
            noise = np.random.default_rng([seed, i]).integers(0, 9, (50, 60))
            levels = np.linspace(0, 200, 60 * 50).reshape(50, 60) + noise
            Image.fromarray(levels.astype(np.uint8)).convert("RGB").save(root / name / f"{i}.png")


def unreadable(root: Path) -> None:
    for i in range(4):
        draw(root / "cat" / f"{i}.png", 0, i)
        draw(root / "label" / f"{i}.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    "make",
    [photographs, pictograms, without_namesakes, people_in_masks, a_camera_that_stands_still, unreadable],
)
def test_images_of_another_origin_stay(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    assert derived(tmp_path) == {}

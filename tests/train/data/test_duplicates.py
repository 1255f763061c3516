"""The same picture is known through re-encoding, resizing and brightness; look-alikes are different."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance
from sklearn.datasets import load_digits

from train.data.duplicates import NearDuplicate, compare, labels_decide, near_duplicates
from train.data.sample import draw_face
from train.data.scan import scan


def face(seed: int) -> Image.Image:
    return draw_face(("cat", "dog")[seed % 2], np.random.default_rng(seed))


def near(folder: Path) -> dict[str, NearDuplicate]:
    """Near duplicates in a folder, by file name."""
    names = sorted(path.name for path in folder.iterdir())
    result = scan(folder, names, folder.parent / "cache")
    found = near_duplicates([folder / n for n in names], list(result.sha256.values()), result.thumbnails)
    return {name: found[sha256] for name, sha256 in result.sha256.items() if sha256 in found}


def groups(folder: Path) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for name, entry in near(folder).items():
        found.setdefault(entry.group, []).append(name)
    return sorted(found.values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve different drawings, as PNG files that have the same pixels wherever they are opened."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(12):
        face(i).save(root / f"{i}.png")
    return root


CHANGES: dict[str, Callable[[Image.Image, Path], None]] = {
    "re-encoded": lambda image, path: image.save(path, quality=30),
    "half the size": lambda image, path: image.resize((image.width // 2, image.height // 2)).save(path),
    "half again as large": lambda image, path: image.resize(
        (image.width * 3 // 2, image.height * 3 // 2), Image.Resampling.LANCZOS
    ).save(path),
    "squashed": lambda image, path: image.resize((150, 150)).save(path),
    "brighter": lambda image, path: ImageEnhance.Brightness(image).enhance(1.1).save(path),
    "darker": lambda image, path: ImageEnhance.Brightness(image).enhance(0.9).save(path),
    "a row and a column less": lambda image, path: image.crop((1, 1, *image.size)).save(path),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_picture_is_found(folder: Path, change: str) -> None:
    for i in range(12):
        with Image.open(folder / f"{i}.png") as image:
            CHANGES[change](image, folder / f"{i}.copy.jpg")
    assert groups(folder) == sorted([f"{i}.copy.jpg", f"{i}.png"] for i in range(12))


def test_a_picture_stored_on_its_side_is_found_and_one_that_lies_on_its_side_is_another(
    folder: Path,
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to look at it
    with Image.open(folder / "0.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).save(folder / "upright.jpg", exif=exif)
        image.transpose(Image.Transpose.ROTATE_90).save(folder / "lying.jpg")
    assert groups(folder) == [["0.png", "upright.jpg"]]


def test_different_drawings_are_different(tmp_path: Path) -> None:
    for i in range(120):
        (tmp_path / "images").mkdir(exist_ok=True)
        face(i).save(tmp_path / "images" / f"{i}.jpg")
    assert groups(tmp_path / "images") == []


@pytest.mark.parametrize("scale", [1, 4])
def test_handwritten_digits_do_not_collapse(tmp_path: Path, scale: int) -> None:
    """1,797 digits of 8x8 pixels in ten classes, of which many look alike at a glance."""
    for i, digit in enumerate(load_digits().images):
        image = Image.fromarray((digit * 15.9).astype(np.uint8))
        image.resize((8 * scale, 8 * scale), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
    names = [f"{i}.png" for i in range(1797)]
    result = scan(tmp_path, names, tmp_path / "cache")
    found = near_duplicates([tmp_path / n for n in names], list(result.sha256.values()), result.thumbnails)
    assert len(found) <= 4, "0.2 % of them, in pairs"
    assert all(count == 2 for count in Counter(entry.group for entry in found.values()).values())


def shape(color: str, at: int = 20, mark: bool = False) -> Image.Image:
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((at, 20, at + 50, 70), fill=color)
    draw.rectangle((10, 74, 86, 90), outline="black")
    if mark:
        draw.rectangle((78, 8, 86, 16), fill="black")
    return image


def test_color_place_and_a_small_mark_make_another_picture(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    shapes = {
        "red": shape("#c02020"),
        "red again": ImageEnhance.Brightness(shape("#c02020")).enhance(0.95),
        "blue": shape("#2020c0"),
        "green": shape("#108010"),
        "elsewhere": shape("#c02020", at=26),
        "marked": shape("#c02020", mark=True),
    }
    for name, image in shapes.items():
        image.save(root / f"{name}.png")
    assert groups(root) == [["red again.png", "red.png"]]


def test_plain_and_dark_pictures_are_no_copies_of_each_other(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 40, 64)[:, None, None]
    for i in range(10):
        noise = rng.integers(0, 4, (64, 64, 3))
        Image.fromarray((noise + 5 * i).astype(np.uint8)).save(root / f"plain {i}.png")
        Image.fromarray((noise + slope).astype(np.uint8)).save(root / f"gradient {i}.png")
    assert groups(root) == []


def test_a_chain_of_small_changes_is_no_single_group(tmp_path: Path) -> None:
    """A camera that pans: each frame is nearly the next one, the first is nothing like the last."""
    root = tmp_path / "images"
    root.mkdir()
    scene = face(3).resize((400, 200))
    for i in range(50):
        scene.crop((i, 0, i + 300, 200)).save(root / f"{i:02}.png")
    found = groups(root)
    assert len(found) > 4
    for names in found:
        assert int(names[-1][:2]) - int(names[0][:2]) < 12


def test_a_picture_that_is_there_a_hundred_times_is_one_group(folder: Path) -> None:
    with Image.open(folder / "0.png") as image:
        for quality in range(40, 96):
            image.save(folder / f"{quality}.jpg", quality=quality)
            image.resize((quality + 80, 120)).save(folder / f"{quality}.png")
    assert [len(names) for names in groups(folder)] == [113]


def test_groups_are_a_function_of_content(folder: Path) -> None:
    for i in range(6):
        with Image.open(folder / f"{i}.png") as image:
            image.save(folder / f"{i}.jpg", quality=50)
    before = near(folder)
    for i in range(6):
        (folder / f"{i}.jpg").rename(folder / f"a{9 - i}.jpg")
    after = near(folder)
    assert {before[f"{i}.jpg"] == after[f"a{9 - i}.jpg"] for i in range(6)} == {True}
    assert {entry.similarity for entry in after.values()} > {1.0}


def test_a_file_that_is_gone_since_the_scan_has_no_copies(folder: Path) -> None:
    with Image.open(folder / "0.png") as image:
        image.save(folder / "copy.jpg")
    names = sorted(path.name for path in folder.iterdir())
    result = scan(folder, names, folder.parent / "cache")
    (folder / "copy.jpg").unlink()
    files = [folder / name for name in names]
    assert near_duplicates(files, list(result.sha256.values()), result.thumbnails) == {}


def test_similarity_is_one_for_equal_pictures_falls_with_the_change_and_has_no_direction() -> None:
    small = np.asarray(face(5).resize((32, 32)))[None]
    noisy = [small + np.random.default_rng(0).normal(0, s, small.shape) for s in (4, 10)]
    others = [np.clip(values, 0, 255).astype(np.uint8) for values in noisy]
    values = [float(compare(small, other)[0]) for other in (small, *others)]
    assert values[0] == 1
    assert values[0] > values[1] > values[2]
    assert values[1:] == pytest.approx([float(compare(other, small)[0]) for other in others], abs=0.02)
    assert compare(small, 255 - small)[0] == 0


def test_a_copy_differs_by_a_third_of_the_contrast_or_40_levels_at_most_and_has_detail() -> None:
    drawn = np.asarray(face(5).resize((32, 32)))[None].astype(float)

    def changed(gain: float, shift: float) -> np.ndarray:  # type: ignore[type-arg]
        return np.round(100 + shift + 0.4 * gain * (drawn - 128)).astype(np.uint8)

    for gain, shift in ((1.25, 0), (1, 30)):
        assert compare(changed(1, 0), changed(gain, shift))[0] > 0.9
    for gain, shift in ((1.45, 0), (1, 50)):
        assert compare(changed(1, 0), changed(gain, shift))[0] == 0
    slope = np.broadcast_to(np.linspace(100, 140, 32)[:, None, None], (1, 32, 32, 3)).astype(np.uint8)
    assert compare(slope, slope)[0] == 0


@pytest.mark.parametrize(
    ("contradictions", "groups_in_all", "decide"),
    [(0, 4, False), (4, 4, False), (5, 40, False), (12, 40, True)],
)
def test_labels_that_often_differ_within_groups_decide(
    contradictions: int, groups_in_all: int, decide: bool
) -> None:
    known = {f"{g}{side}": NearDuplicate(str(g), 1.0) for g in range(groups_in_all) for side in "ab"}
    names = [str(g) for g in range(groups_in_all) for _ in "ab"]
    labels = [int(side == "b" and g < contradictions) for g in range(groups_in_all) for side in "ab"]
    assert labels_decide([*names, "alone"], [*labels, 1], known) is decide

"""Reading: again after a bad moment, a bounded number of times; smaller, within a stated difference."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from train_data import draw

from serve.contract.errors import UserError
from serve.contract.images import load_image
from serve.contract.orientation import ORIENTATION, on_its_side
from train.data import reading
from train.data.reading import LEAST_RATIO, Shrink, read_image

PHOTOGRAPHS = os.environ.get("PUREBRED_PHOTOGRAPHS", "")


@pytest.mark.parametrize("failures", [1, 3])
def test_a_bad_moment_of_the_file_system_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    path, attempts, read = draw(tmp_path / "a.png"), [], reading.read_image_file
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0, 0.0))

    def flaky(name: Any) -> bytes:
        attempts.append(name)
        if len(attempts) <= failures:
            raise OSError(5, "Input/output error")
        return read(name)

    monkeypatch.setattr(reading, "read_image_file", flaky)
    assert read_image(path).size == (24, 20)
    assert len(attempts) == failures + 1


@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_a_file_that_stays_bad_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0, 0.0))
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        read_image(tmp_path / "a.png")


def picture(width: int, height: int) -> Image.Image:
    """As sharp as photographs are, with colours and edges."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    soft = np.asarray(noise.filter(ImageFilter.GaussianBlur(3))).astype(float)
    pixels = np.clip((soft - 128) * 6 + 128, 0, 255).astype(np.uint8)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (220, 40, 60)
    return Image.fromarray(pixels)


def jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92, exif=exif)
    return file.getvalue()


def both(data: bytes, shrink: Shrink) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels after decoding all of it, and by the short way."""
    whole, short = shrink(load_image(data)), shrink(load_image(data, shrink.decode))
    assert whole.shape == short.shape
    return whole.astype(int), short.astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(640, 480), (643, 485), (485, 647), (1201, 330)])
def test_a_jpeg_that_is_decoded_in_part_is_within_the_stated_difference(
    size: tuple[int, int], orientation: int
) -> None:
    whole, short = both(jpeg(picture(*size), orientation), Shrink(50))
    difference = np.abs(whole - short)
    assert difference.mean() < 1, "of a picture sharper than photographs are"
    assert difference.max() <= 16
    assert difference.any(), "less was decoded"


def test_where_that_would_change_too_much_all_is_decoded() -> None:
    data = jpeg(picture(2 * LEAST_RATIO * 50 + 40, 2 * LEAST_RATIO * 50 - 1))
    whole, short = both(data, Shrink(50))
    assert np.array_equal(whole, short)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_other_formats_are_decoded_whole(kind: str) -> None:
    file = io.BytesIO()
    picture(640, 480).save(file, kind)
    whole, short = both(file.getvalue(), Shrink(50))
    assert np.array_equal(whole, short)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_become_rgb(mode: str) -> None:
    whole, short = both(jpeg(picture(640, 480).convert(mode)), Shrink(50))
    assert short.shape == (50, 67, 3)
    assert np.abs(whole - short).mean() < 1


def test_a_truncated_file_is_unreadable() -> None:
    data = jpeg(picture(640, 480))
    with pytest.raises(UserError, match="truncated"):
        load_image(data[: len(data) * 2 // 3], Shrink(50).decode)


@pytest.mark.skipif(not PHOTOGRAPHS, reason="PUREBRED_PHOTOGRAPHS names no folder of photographs")
def test_photographs_are_within_the_stated_difference() -> None:
    """At a half, which is all that photographs of 500 pixels allow."""
    shrink = Shrink(60)
    differences = []
    for path in sorted((Path(PHOTOGRAPHS) / "kaggle" / "test1").iterdir())[:60]:
        if min(Image.open(path).size) < 2 * LEAST_RATIO * shrink.short_side:
            continue
        whole = shrink(read_image(path)).astype(int)
        differences.append(np.abs(whole - shrink(read_image(path, shrink.decode))))
    assert len(differences) > 20
    assert max(d.max() for d in differences) <= 12
    assert np.mean([d.mean() for d in differences]) < 0.4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_size_of_an_image_on_its_side_is_known_without_decoding(kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, kind, exif=exif)
    image = Image.open(io.BytesIO(file.getvalue()))
    size = image.size[::-1] if on_its_side(image) else image.size
    assert size == load_image(file.getvalue()).size == (30, 40)

"""A picture that comes out as one colour is named where its file holds more, and no other is."""

import numpy as np
import pytest
from PIL import Image
from serve_model import encode, noise, solid

from serve.contract.doubts import BLANK, Doubts
from serve.contract.errors import UserError
from serve.contract.images import load_image, load_whole
from train.data.scan import ENOUGH


def doubts_of(data: bytes) -> list[str]:
    """Of the whole picture, and of one that is decoded in part: they must agree."""
    doubts: list[str] = []
    parts: list[str] = []
    load_image(data, doubts=doubts)
    load_image(data, ENOUGH.decode, parts)
    assert doubts == parts
    return doubts


def erased(data: bytes) -> bytes:
    """A JPEG whose scan is ff, as in memory that was never written: the decoder fills with grey."""
    start = data.index(b"\xff\xda") + 14
    return data[:start] + b"\xff" * (len(data) - start - 2) + data[-2:]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(500, 374), (1600, 1200)])
def test_a_jpeg_whose_scan_was_never_written_is_an_error(size: tuple[int, int], mode: str) -> None:
    data = erased(encode(noise(*size).convert(mode), "JPEG", quality=85))
    for decode in (load_whole, ENOUGH.decode):
        with pytest.raises(UserError, match="truncated"):
            load_image(data, decode)


def test_an_animation_that_begins_with_one_colour_is_named() -> None:
    frames = [noise(200, 150, seed) for seed in range(3)]
    assert doubts_of(encode(solid((9, 9, 9), (200, 150)), "GIF", save_all=True, append_images=frames)) == [
        BLANK
    ]


FLAT = {
    "white PNG": encode(solid((255, 255, 255), (1000, 800)), "PNG"),
    "bitmap": encode(solid((9, 8, 7), (300, 200)), "BMP"),
    "TIFF": encode(solid((9, 8, 7), (300, 200)), "TIFF"),
    "PPM": encode(solid((9, 8, 7), (300, 200)), "PPM"),
    "JPEG": encode(solid((9, 8, 7), (4000, 3000)), "JPEG", quality=100, subsampling=0),
    "JPEG with a profile and a preview": encode(
        solid((90, 80, 70), (200, 100)),
        "JPEG",
        icc_profile=np.random.default_rng(0).bytes(20_000),
        exif=b"Exif\0\0" + np.random.default_rng(1).bytes(30_000),
    ),
    "PNG with a profile": encode(
        solid((90, 80, 70), (200, 100)), "PNG", icc_profile=np.random.default_rng(0).bytes(20_000)
    ),
    "JPEG before a video": encode(solid((90, 80, 70)), "JPEG") + np.random.default_rng(0).bytes(100_000),
}


@pytest.mark.parametrize("name", FLAT)
def test_an_extent_declared_as_one_colour_is_none_to_doubt(name: str) -> None:
    assert doubts_of(FLAT[name]) == []


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_a_faint_picture_is_none_to_doubt(file_format: str) -> None:
    """Sky, fog, paper: it varies by less than 16 levels, and is all there."""
    grain = np.random.default_rng(0).integers(200, 208, (300, 400, 3), np.uint8)
    assert doubts_of(encode(Image.fromarray(grain), file_format)) == []


def test_a_pattern_so_fine_that_it_is_grey_when_small_is_none_to_doubt() -> None:
    fine = (np.indices((1600, 1600)).sum(0) % 2 * 60 + 100).astype(np.uint8)
    assert doubts_of(encode(Image.fromarray(fine).convert("RGB"), "JPEG", quality=95)) == []


def test_pictures_are_counted_by_reason_with_three_names() -> None:
    doubts = Doubts()
    for i in range(5):
        doubts.add(f"{i}.png", "many")
    doubts.add("x.png", "one")
    many, one = doubts.lines()
    assert many.startswith("5 ")
    assert "'2.png'" in many
    assert "'3.png'" not in many
    assert many.endswith("many")
    assert one.startswith("1 ")
    assert "'x.png'" in one

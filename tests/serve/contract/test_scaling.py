"""Scaled decoding: the pixels of full decoding to within its rounding, whatever a JPEG is, or in full."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from serve_model import broken_files, encode
from train_data import settings

from export.validation_images import ValidationImages
from serve.contract.errors import UserError
from serve.contract.images import load_image
from serve.contract.orientation import ORIENTATION
from serve.contract.preprocess import MODES, Preprocess
from serve.contract.scaling import EXTENT, extent_of
from train.data.index import prepare_data
from train.distributed import Ranks
from train.engine.loaders import build_loaders

PHOTOGRAPHS = os.environ.get("PUREBRED_PHOTOGRAPHS", "")
SIZES = [(1600, 1200), (1601, 1203), (807, 1209), (1607, 1615)]


def picture(width: int, height: int) -> Image.Image:
    """Sharp and asymmetric, with colours and edges."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    soft = np.asarray(noise.filter(ImageFilter.GaussianBlur(3))).astype(float)
    pixels = np.clip((soft - 128) * 6 + 128, 0, 255).astype(np.uint8)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (220, 40, 60)
    return Image.fromarray(pixels)


def jpeg(image: Image.Image, orientation: int = 1, **options: object) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(image, "JPEG", **{"quality": 92, "exif": exif, **options})


def both(data: bytes, preprocess: Preprocess) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pixels after decoding all, and by `decode`."""
    whole, scaled = preprocess(load_image(data)), preprocess(load_image(data, preprocess.decode))
    return whole.astype(int), scaled.astype(int)


def differ_little(data: bytes, preprocess: Preprocess) -> None:
    whole, scaled = both(data, preprocess)
    difference = np.abs(whole - scaled)
    assert difference.any(), "less was decoded"
    assert difference.mean() < 0.6, "of a picture sharper than photographs are"
    assert difference.max() <= 12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_pixels_are_those_of_full_decoding(size: tuple[int, int], orientation: int, mode: str) -> None:
    differ_little(jpeg(picture(*size), orientation), Preprocess(mode, 64, 73))


@pytest.mark.parametrize("name", ["progressive", "4:4:4", "grey", "CMYK", "MPO", "profile"])
def test_kinds_of_jpegs(name: str) -> None:
    image, preprocess = picture(1203, 901), Preprocess("crop", 64, 73)
    data = {
        "progressive": lambda: jpeg(image, progressive=True),
        "4:4:4": lambda: jpeg(image, subsampling=0),
        "grey": lambda: jpeg(image.convert("L")),
        "CMYK": lambda: jpeg(image.convert("CMYK")),
        "MPO": lambda: encode(image, "MPO", save_all=True, append_images=[image.resize((99, 99))]),
        "profile": lambda: jpeg(image, icc_profile=b"damaged"),
    }[name]()
    differ_little(data, preprocess)


@pytest.mark.parametrize(
    ("mode", "scales"),
    [
        # width of a picture that is 1200 high -> pixels by which one is decoded
        ("crop", {50: 8, 51: 4, 100: 4, 101: 2, 200: 2, 201: 1}),
        ("squash", {50: 8, 51: 4, 100: 4, 101: 2, 200: 2, 201: 1}),
        ("pad", {66: 8, 67: 4, 133: 4, 134: 2, 266: 2, 267: 1}),
    ],
)
def test_the_smallest_scale_that_leaves_enough_pixels_is_taken(mode: str, scales: dict[int, int]) -> None:
    data = jpeg(picture(1600, 1200))
    for side, scale in scales.items():
        decoded = load_image(data, Preprocess(mode, min(side, 40) if mode == "crop" else side, side).decode)
        assert decoded.size == (1600 // scale, 1200 // scale), side
        assert extent_of(decoded).size == (1600, 1200)


def test_what_a_model_needs_in_full_is_decoded_in_full() -> None:
    """A model of ratio 0, other formats, and what is too small for it: bit for bit."""
    large, small = picture(1600, 1200), picture(400, 300)
    in_full = Preprocess("crop", 32, 37, decode_ratio=0)
    new = Preprocess("crop", 32, 37)
    whole = [(jpeg(large), in_full), (jpeg(small), Preprocess("crop", 64, 73))]
    whole += [(encode(large, kind), new) for kind in ("PNG", "WEBP", "BMP")]
    for data, preprocess in whole:
        decoded = load_image(data, preprocess.decode)
        assert decoded.tobytes() == load_image(data).tobytes()
        assert EXTENT not in decoded.info


def test_a_text_of_a_png_is_no_picture() -> None:
    data = io.BytesIO()
    Image.new("RGB", (40, 30)).save(data, "PNG", pnginfo=_text(EXTENT, "0 0 9 9"))
    image = load_image(data.getvalue())
    assert extent_of(image).size == (40, 30)
    assert Preprocess("pad", 8)(image).shape == (8, 8, 3)


def _text(key: str, value: str) -> object:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(key, value)
    return info


def test_a_lossless_jpeg_is_decoded_in_full() -> None:
    """As of DICOM files; libjpeg has no smaller scales of it."""

    def segment(marker: int, *body: int) -> bytes:
        return bytes([0xFF, marker, 0, len(body) + 2, *body])

    side = 1024
    frame = segment(0xC3, 8, *divmod(side, 256), *divmod(side, 256), 1, 1, 0x11, 0)
    codes = segment(0xC4, 0, 1, *[0] * 15, 0)  # of one bit: as the pixel before
    scan = segment(0xDA, 1, 1, 0, 1, 0, 0)
    data = b"\xff\xd8" + frame + codes + scan + bytes(side * side // 8) + b"\xff\xd9"
    image = load_image(data, Preprocess("crop", 64, 73).decode)
    assert (image.size, image.getextrema()) == ((side, side), ((128, 128),) * 3)


def test_a_line_is_decoded() -> None:
    for size in ((30000, 1), (1, 30000), (9, 30000)):
        for mode in MODES:
            both(jpeg(Image.new("RGB", size, "red"), 3), Preprocess(mode, 16, 20))


def test_errors_are_those_of_full_decoding() -> None:
    large = jpeg(picture(1600, 1200))
    broken = [data for data, _ in broken_files().values()]
    broken += [large[: len(large) * share // 8] for share in range(1, 8)] + [large[:-2], large[:-40]]
    broken += [large[: len(large) // 2] + b"\xff\xd9"]
    preprocess = Preprocess("crop", 32, 37)
    for data in broken:
        outcomes = []
        for decode in (Preprocess(decode_ratio=0).decode, preprocess.decode):
            doubts: list[str] = []
            try:
                load_image(data, decode, doubts)
                outcomes.append(("", doubts))
            except UserError as error:
                outcomes.append((str(error), doubts))
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("ratio", [-1, 65, 2.5, True, "3"])
def test_a_bad_ratio_is_refused(ratio: object) -> None:
    with pytest.raises(ValueError, match=r"decode_ratio .*0\.\.64"):
        Preprocess(decode_ratio=ratio)  # type: ignore[arg-type]


@pytest.mark.parametrize("cached", [True, False])
def test_validation_and_verification_see_the_pixels_that_are_served(tmp_path: Path, cached: bool) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        image = picture(900 + 7 * i, 700)
        (folder / f"{('cat', 'dog')[i % 2]}.{i}.jpg").write_bytes(jpeg(image, 1 + i % 8))
    config = settings(tmp_path, pixel_cache="on" if cached else "off", near_duplicates=False)
    data = prepare_data(config)
    _, val = build_loaders(config, config, data, Ranks(), torch.device("cpu"), 0, print)
    (batch,) = val([[(0, i, 1.0) for i in range(len(data.val))]])
    preprocess, paths = config.preprocess(), data.val.paths
    files = [(data.val.root / path).read_bytes() for path in paths]
    served = [preprocess(load_image(file, preprocess.decode)) for file in files]
    np.testing.assert_array_equal(batch.images.numpy(), served)
    assert not np.array_equal([preprocess(load_image(file)) for file in files], served)
    images = ValidationImages(data.val.root, paths, ["cat"] * len(paths), True)
    verified = [preprocess(images.load(path, preprocess.decode)) for path in paths]
    np.testing.assert_array_equal(verified, served)


@pytest.mark.skipif(not PHOTOGRAPHS, reason="PUREBRED_PHOTOGRAPHS names no folder of photographs")
def test_photographs_are_within_the_stated_difference() -> None:
    """At a half, which is all that photographs of 500 pixels allow."""
    preprocess, differences = Preprocess("crop", 48, 55), []
    for path in sorted((Path(PHOTOGRAPHS) / "kaggle" / "test1").iterdir())[:60]:
        whole, scaled = both(path.read_bytes(), preprocess)
        if (whole != scaled).any():
            differences.append(np.abs(whole - scaled))
    assert len(differences) > 20
    assert np.mean([d.mean() for d in differences]) < 0.3
    assert max(d.max() for d in differences) <= 12

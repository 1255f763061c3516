"""Embedded colour profiles: wide colours become those of sRGB, in training as in serving; others stay."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms
from train_data import settings

from serve.contract.images import load_image
from serve.contract.preprocess import Preprocess
from train.data.index import prepare_data
from train.distributed import Ranks
from train.engine.loaders import build_loaders

XYZ = tuple[float, float, float]
SIDE = 32


def icc(red: XYZ, green: XYZ, blue: XYZ, gamma: float) -> bytes:
    """A matrix profile of version 2: XYZ of the primaries under D50, and one gamma."""

    def tag(kind: bytes, body: bytes) -> bytes:
        return (kind + b"\0\0\0\0" + body).ljust(-(-(8 + len(body)) // 4) * 4, b"\0")

    def colour(values: XYZ) -> bytes:
        return tag(b"XYZ ", struct.pack(">3i", *(round(value * 65536) for value in values)))

    curve = tag(b"curv", struct.pack(">IH", 1, round(gamma * 256)))
    text = tag(b"desc", struct.pack(">I", 5) + b"test\0" + b"\0" * 78)
    tags = {b"desc": text, b"cprt": tag(b"text", b"none\0"), b"wtpt": colour((0.9642, 1.0, 0.8249))}
    tags |= {b"rXYZ": colour(red), b"gXYZ": colour(green), b"bXYZ": colour(blue)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data
    size = 128 + len(table) + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ").ljust(36, b"\0")
    head += b"acsp".ljust(32, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


P3 = icc((0.5151, 0.2412, -0.0011), (0.2919, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841), 2.2)
PROPHOTO = icc((0.7977, 0.2880, 0.0), (0.1352, 0.7119, 0.0), (0.0313, 0.0001, 0.8249), 1.8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encode(colour: tuple[int, ...], profile: bytes | None, form: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    more = {"icc_profile": profile} if profile else {}
    Image.new(mode, (SIDE, SIDE), colour).save(buffer, form, quality=100, **more)
    return buffer.getvalue()


def pixel(data: bytes, preprocess: Preprocess = Preprocess("squash", 8)) -> NDArray[np.int64]:  # noqa: B008
    return preprocess(load_image(data))[4, 4].astype(int)


def test_the_colour_of_a_profile_is_computed_as_its_standard_says() -> None:
    """Display P3 to sRGB by the matrices of SMPTE EG 432-1 and IEC 61966-2-1, gamma 2.2 in."""
    matrix = np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]])
    for colour in ((200, 120, 90), (90, 140, 100), (128, 128, 128)):
        linear = matrix @ (np.array(colour) / 255) ** 2.2
        encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        assert np.abs(pixel(encode(colour, P3)) - 255 * encoded).max() <= 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_format_hands_its_profile_over(form: str) -> None:
    plain, converted = (pixel(encode((200, 120, 90), profile, form)) for profile in (None, PROPHOTO))
    assert np.abs(converted - plain).max() > 20


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_a_profile_of_srgb_leaves_every_bit_and_so_does_none(mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    preprocess = Preprocess(mode, 16, 20)
    expected = preprocess(Image.fromarray(noise))
    for profile in (None, SRGB):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG", icc_profile=profile)
        np.testing.assert_array_equal(preprocess(load_image(buffer.getvalue())), expected)


@pytest.mark.parametrize("profile", [b"x", P3[:200], P3[:128] + b"\xff" * 300, b"\0" * 500])
def test_a_damaged_profile_leaves_the_pixels_as_they_are(profile: bytes) -> None:
    assert pixel(encode((200, 120, 90), profile)).tolist() == [200, 120, 90]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"gAMA", struct.pack(">I", 100_000)),
        (b"cICP", bytes((12, 13, 0, 1))),
        (b"cICP", bytes((9, 16, 0, 1))),
    ],
    ids=["linear", "Display P3", "BT.2020 PQ"],
)
def test_colours_that_a_chunk_of_a_png_names_are_not_converted(kind: bytes, body: bytes) -> None:
    """A known limit."""
    data, header = encode((200, 120, 90), None), 33
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    assert pixel(data[:header] + chunk + data[header:]).tolist() == [200, 120, 90]


def test_a_profile_of_other_pixels_is_not_applied() -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (SIDE, SIDE), (55, 215, 215, 0)).save(buffer, "JPEG", quality=100, icc_profile=P3)
    assert np.abs(pixel(buffer.getvalue()).astype(int) - [200, 40, 40]).max() < 4
    grey = bytearray(P3)
    grey[16:20] = b"GRAY"
    assert pixel(encode((200, 120, 90), bytes(grey))).tolist() == [200, 120, 90]


def test_transparent_and_turned_pictures_keep_their_profile() -> None:
    expected = pixel(encode((200, 120, 90), PROPHOTO))
    assert pixel(encode((200, 120, 90, 255), PROPHOTO, mode="RGBA")).tolist() == expected.tolist()
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (SIDE, SIDE), (200, 120, 90)).save(buffer, "PNG", icc_profile=PROPHOTO, exif=exif)
    assert pixel(buffer.getvalue()).tolist() == expected.tolist()


def test_threads_share_a_transform() -> None:
    data = encode((200, 120, 90), PROPHOTO)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: tuple(pixel(data)), range(100)))) == 1


@pytest.mark.parametrize("cached", [True, False])
def test_training_and_validation_see_the_pixels_that_are_served(tmp_path: Path, cached: bool) -> None:
    for i in range(12):
        name = f"{('cat', 'dog')[i % 2]}.{i}.png"
        (tmp_path / "images").mkdir(exist_ok=True)
        data = encode((200, 120 + i, 90), PROPHOTO)
        (tmp_path / "images" / name).write_bytes(data)
    config = settings(tmp_path, pixel_cache="on" if cached else "off", near_duplicates=False)
    data = prepare_data(config)
    train, val = build_loaders(config, config, data, Ranks(), torch.device("cpu"), 0, print)
    for loader, images in ((train, data.train), (val, data.val)):
        (batch,) = loader([[(0, i, 1.0) for i in range(len(images))]])
        files = [images.root / path for path in images.paths]
        served = [config.preprocess()(load_image(file.read_bytes())) for file in files]
        np.testing.assert_array_equal(batch.images.numpy(), served)

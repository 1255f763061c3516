"""A PNG whose data end before its last row is an error, and a black picture is none."""

import io
import struct
import zlib

import pytest
from hostile_images import png_with_text
from PIL import Image

from serve.contract.errors import UserError
from serve.contract.images import load_image

# of an interlaced picture: first column and row, and the distances to the next ones
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type


def png(
    width: int,
    height: int,
    rows: int,
    colour: int = 2,
    depth: int = 8,
    interlaced: bool = False,
    passes: int = 7,
    shade: int = 0,
) -> bytes:
    """A picture that is black, or of `shade`, where it has rows."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    parts = [(width, rows)]
    if interlaced:
        parts = [(-(-(width - x) // dx), -(-(rows - y) // dy)) for x, y, dx, dy in PASSES[:passes]]
    raw = b"".join(
        (b"\0" + bytes([shade]) * -(-columns * depth * CHANNELS[colour] // 8)) * count
        for columns, count in parts
        if columns > 0 and count > 0
    )
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(6)) if colour == 3 else b""
    data = zlib.compress(raw)
    body = chunk(b"IDAT", data[:7]) + chunk(b"IDAT", data[7:])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (13, 9), (64, 2)])
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colour", "depth"), [(0, 1), (0, 8), (0, 16), (2, 8), (3, 4), (4, 8), (6, 8)])
def test_black_pictures_are_whole(size: tuple[int, int], interlaced: bool, colour: int, depth: int) -> None:
    assert load_image(png(*size, size[1], colour, depth, interlaced)).size == size


@pytest.mark.parametrize("rows", [0, 8, 63])
@pytest.mark.parametrize("interlaced", [False, True])
def test_missing_rows_are_an_error(rows: int, interlaced: bool) -> None:
    with pytest.raises(UserError, match="truncated"):
        load_image(png(64, 64, rows, interlaced=interlaced))


@pytest.mark.parametrize("height", [8, 9])
def test_an_interlaced_picture_without_its_last_pass_is_an_error(height: int) -> None:
    assert load_image(png(13, height, height, interlaced=True, shade=255)).getextrema() == ((255, 255),) * 3
    with pytest.raises(UserError, match="truncated"):
        load_image(png(13, height, height, interlaced=True, passes=6, shade=255))


def test_long_texts_and_profiles_cost_no_picture() -> None:
    """Generators keep their settings in a text, scanners have profiles of megabytes."""
    assert load_image(png_with_text(10_000_000)).size == (20, 30)
    file, profile = io.BytesIO(), bytes(3_000_000)
    Image.new("RGB", (9, 9), (200, 40, 40)).save(file, "PNG", icc_profile=profile)
    assert load_image(file.getvalue()).info["icc_profile"] == profile


def test_a_black_last_row_costs_no_picture() -> None:
    image = Image.new("RGBA", (9, 9), (200, 40, 40, 255))
    image.paste((0, 0, 0, 0), (0, 8, 9, 9))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert load_image(buffer.getvalue()).getpixel((0, 8)) == (255, 255, 255)

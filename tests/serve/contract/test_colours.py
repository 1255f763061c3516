"""Grey of any depth and transparency of any kind come out as shades, and are named where they cannot."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from serve_model import encode, noise

from serve.contract.doubts import BANDS, CLEAR, FADED, NARROW
from serve.contract.errors import UserError
from serve.contract.images import load_image


def load(data: bytes) -> tuple[NDArray[np.uint8], list[str]]:
    doubts: list[str] = []
    image = load_image(data, doubts=doubts)
    assert image.mode == "RGB"
    return np.asarray(image), doubts


def png(depth: int, kind: int, values: Sequence[int], clear: bytes = b"", colours: bytes = b"") -> bytes:
    """One row of samples (kind 0: grey, 2: RGB, 3: palette) with a transparent colour."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    bits = "".join(format(value, f"0{depth}b") for value in values)
    row = int(bits.ljust(-len(bits) // 8 * -8, "0"), 2).to_bytes((len(bits) + 7) // 8, "big")
    width = len(values) // (3 if kind == 2 else 1)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0))
        + (chunk(b"PLTE", colours) if colours else b"")
        + (chunk(b"tRNS", clear) if clear else b"")
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


# -- a PNG's transparent colour --------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_shade_of_grey_is_white_and_no_other(depth: int) -> None:
    top = (1 << depth) - 1
    shades = range(top + 1) if depth < 8 else [0, 1, top // 3, top // 2, top - 1, top]
    for clear in shades:
        pixels, _ = load(png(depth, 0, list(shades), struct.pack(">H", clear)))
        eight = [shade >> 8 if depth == 16 else shade * 255 // top for shade in shades]
        assert pixels[0, :, 0].tolist() == [
            255 if shade == clear else level for shade, level in zip(shades, eight, strict=True)
        ]


@pytest.mark.parametrize("clear", [(0, 0, 0), (65535, 0, 65535), (0x5555,) * 3, (0x1234, 0x5678, 0x9ABC)])
def test_the_transparent_colour_of_16_bits_is_compared_in_all_of_them(clear: tuple[int, ...]) -> None:
    near = tuple(value ^ 1 for value in clear)
    pixels, _ = load(png(16, 2, [*clear, *near, 7000, 9000, 50_000], struct.pack(">3H", *clear)))
    assert pixels[0].tolist() == [[255] * 3, [value >> 8 for value in near], [27, 35, 195]]


def test_the_transparent_colour_of_8_bits_and_of_a_palette_is_white() -> None:
    pixels, _ = load(png(8, 2, [1, 2, 3, 1, 2, 4], struct.pack(">3H", 1, 2, 3)))
    assert pixels[0].tolist() == [[255] * 3, [1, 2, 4]]
    colours = bytes((200, 40, 40, 40, 60, 200))
    for depth in (1, 2, 4, 8):
        pixels, _ = load(png(depth, 3, [0, 1], b"\xff\0", colours))
        assert pixels[0].tolist() == [[200, 40, 40], [255] * 3]


# -- palettes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bitmap_whose_palette_is_black_and_white_is_read_at_its_own_bits(bits: int) -> None:
    mask = Image.new("P", (8, 2))
    mask.putdata([0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1])
    mask.putpalette([0, 0, 0, 255, 255, 255])
    levels = np.asarray(mask)
    data = encode(mask, "BMP")
    assert struct.unpack_from("<H", data, 28) == (8,)
    if bits == 4:
        packed = (levels[::-1, ::2] << 4 | levels[::-1, 1::2]).tobytes()
        data = data[:28] + struct.pack("<H", 4) + data[30:-16] + packed
    np.testing.assert_array_equal(load(data)[0][..., 1], levels * 255)


def test_a_tiff_whose_palette_has_8_bits_is_not_black() -> None:
    image = Image.new("P", (2, 1))
    image.putdata([1, 2])
    image.putpalette([0, 0, 0, 200, 40, 40, 40, 60, 200])
    plain = encode(image, "TIFF")
    with Image.open(io.BytesIO(plain)) as opened:
        colours = opened.tag_v2[320]  # type: ignore[attr-defined]
    sixteen, eight = (struct.pack("<768H", *(c // by for c in colours)) for by in (1, 256))
    assert sixteen in plain
    for data in (plain, plain.replace(sixteen, eight)):
        assert load(data)[0][0].tolist() == [[200, 40, 40], [40, 60, 200]]


# -- an alpha channel of zeros ---------------------------------------------------------------------------


def hidden(mode: str) -> Image.Image:
    image = noise(48, 40).convert("L" if mode == "LA" else "RGB")
    image.putalpha(0)
    assert image.mode == mode
    return image


def bitmap(size_of_header: int, masks: bytes) -> bytes:
    """A Windows bitmap of 32 bits whose fourth byte is zero."""
    pixels = np.asarray(hidden("RGBA"))[::-1, :, [2, 1, 0, 3]].tobytes()
    start = 14 + size_of_header
    header = struct.pack("<IiiHHIIiiII", size_of_header, 48, 40, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks
    return (
        b"BM"
        + struct.pack("<IHHI", start + len(pixels), 0, 0, start)
        + header.ljust(size_of_header, b"\0")
        + pixels
    )


MASKS = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
HIDDEN = {
    "PNG": encode(hidden("RGBA"), "PNG"),
    "PNG, grey": encode(hidden("LA"), "PNG"),
    "WebP": encode(hidden("RGBA"), "WEBP", lossless=True, exact=True),
    "TIFF": encode(hidden("RGBA"), "TIFF"),
    "TIFF, grey": encode(hidden("LA"), "TIFF"),
    "TIFF that names no alpha": encode(hidden("RGBA"), "TIFF").replace(
        struct.pack("<HHI", 338, 3, 1), struct.pack("<HHI", 340, 3, 1)
    ),
    "bitmap of version 4": bitmap(108, MASKS),
    "bitmap of version 5": bitmap(124, MASKS),
    "palette": png(8, 3, range(256), bytes(256), np.arange(768, dtype=np.uint8).tobytes()),
    "palette of few": png(2, 3, [0, 1, 2], b"\0\0\0", bytes(range(0, 180, 20))),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_an_alpha_channel_of_zeros_hides_no_picture(name: str) -> None:
    pixels, doubts = load(HIDDEN[name])
    assert doubts == []
    if "palette" not in name:
        expected = noise(48, 40).convert("L") if "grey" in name else noise(48, 40)
        np.testing.assert_array_equal(pixels, np.asarray(expected.convert("RGB")))
    else:
        assert np.ptp(pixels) > 100


@pytest.mark.parametrize("colour", [(0, 0, 0, 0), (255, 255, 255, 0), (9, 9, 9, 0)])
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_a_picture_with_nothing_in_it_is_white_and_named(colour: tuple[int, ...], file_format: str) -> None:
    pixels, doubts = load(encode(Image.new("RGBA", (20, 30), colour), file_format))
    assert (pixels == 255).all()
    assert doubts == [CLEAR]


def test_an_animation_that_begins_with_nothing_is_named() -> None:
    blank = Image.new("P", (20, 30), 0)
    data = encode(blank, "GIF", save_all=True, append_images=[Image.new("P", (20, 30), 1)], transparency=0)
    assert load(data)[1] == [CLEAR]


def test_a_white_drawing_on_nothing_is_named_and_a_black_one_is_not() -> None:
    shape = Image.new("L", (40, 40))
    shape.paste(255, (10, 10, 30, 30))
    for shade, doubts in ((255, [FADED]), (250, [FADED]), (0, [])):
        drawing = Image.new("RGB", (40, 40), (shade,) * 3)
        drawing.putalpha(shape)
        assert load(encode(drawing, "PNG"))[1] == doubts


def test_a_tiff_whose_grey_is_multiplied_by_its_alpha_is_laid_over_white() -> None:
    data = encode(Image.new("LA", (1, 1), (50, 128)), "TIFF")
    entry = struct.pack("<HHI", 338, 3, 1)
    assert data.count(entry + b"\2") == 1
    pixels, doubts = load(data.replace(entry + b"\2", entry + b"\1"))
    assert pixels[0, 0].tolist() == [177] * 3
    assert doubts == []


def test_what_is_partly_transparent_is_laid_over_white_as_ever() -> None:
    image = noise(48, 40)
    image.putalpha(Image.linear_gradient("L").resize((48, 40)))
    pixels, doubts = load(encode(image, "PNG"))
    white = Image.new("RGBA", image.size, "white")
    np.testing.assert_array_equal(pixels, np.asarray(Image.alpha_composite(white, image).convert("RGB")))
    assert doubts == []


@pytest.mark.parametrize(
    ("alpha", "geographic", "named"),
    [("noise", True, True), ("mask", True, False), ("noise", False, False)],
)
def test_a_fourth_band_that_may_be_near_infrared_is_named(
    alpha: str, geographic: bool, named: bool
) -> None:
    image, levels = noise(48, 40), np.asarray(noise(48, 40).convert("L"))
    image.putalpha(
        Image.fromarray(levels if alpha == "noise" else np.where(levels > 127, 255, 0).astype("u1"))
    )
    tags = {33550: (1.0, 1.0, 0.0)} if geographic else {}
    assert load(encode(image, "TIFF", tiffinfo=tags))[1] == ([BANDS] if named else [])


# -- grey of more than 8 bits ----------------------------------------------------------------------------


def ramp(bits: int, low: int = 0) -> NDArray[np.uint16]:
    return np.linspace(low, low + (1 << bits) - 1, 48 * 40).astype(np.uint16).reshape(40, 48)


def written(levels: NDArray[np.uint16], kind: str) -> bytes:
    if kind == "PGM":
        return b"P5\n%d %d\n65535\n" % levels.shape[::-1] + levels.astype(">u2").tobytes()
    if kind == "TIFF, white is zero":
        return encode(Image.fromarray(levels), "TIFF", tiffinfo={262: 0})
    if kind == "RGB":
        rows = np.repeat(levels.reshape(-1), 3)
        return png(16, 2, rows.tolist())
    return encode(Image.fromarray(levels), kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF, white is zero", "PGM", "RGB"])
@pytest.mark.parametrize(("bits", "low"), [(10, 0), (12, 0), (10, 20_000), (11, 60_000)])
def test_10_and_12_bits_in_16_are_named(bits: int, low: int, kind: str) -> None:
    assert load(written(ramp(bits, low), kind))[1] == [NARROW]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PGM", "RGB"])
def test_true_16_bits_keep_their_top_8_without_a_word(kind: str) -> None:
    for levels in (ramp(16), ramp(14), ramp(13, 30_000)):
        pixels, doubts = load(written(levels, kind))
        np.testing.assert_array_equal(pixels[..., 0].reshape(-1), levels.reshape(-1) >> 8)
        assert doubts == []


def test_one_shade_of_16_bits_is_one_shade_without_a_word() -> None:
    assert load(encode(Image.new("I;16", (20, 30), 0x2000), "PNG"))[1] == []


def test_a_pgm_that_states_its_white_is_dark_only_if_the_picture_is() -> None:
    dark = np.linspace(0, 60, 48 * 40).astype(">u2")
    pixels, doubts = load(b"P5\n48 40\n1023\n" + dark.tobytes())
    assert (pixels.min(), pixels.max(), doubts) == (0, 15, [])


def tiff_of_12_bits(levels: Sequence[Sequence[int]], **changes: int) -> bytes:
    height, width = len(levels), len(levels[0])
    rows = b""
    for row in levels:
        bits = "".join(format(level, "012b") for level in row)
        rows += int(bits.ljust(-len(bits) // 8 * -8, "0"), 2).to_bytes((len(bits) + 7) // 8, "big")
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 110, 278: height, 279: len(rows)}
    tags |= {int(tag): value for tag, value in changes.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + rows


def test_a_tiff_that_says_12_bits_has_12() -> None:
    pixels, doubts = load(tiff_of_12_bits([[0, 16, 2048], [4095, 4080, 1]]))
    assert pixels[..., 0].tolist() == [[0, 1, 128], [255, 255, 0]]
    assert doubts == []


def test_12_bits_whose_white_is_zero_are_refused_not_shown_as_a_negative() -> None:
    with pytest.raises(UserError):
        load_image(tiff_of_12_bits([[0, 16, 2048]], **{"262": 0}))

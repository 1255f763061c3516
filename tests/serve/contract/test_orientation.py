"""Photographs are turned as a browser turns them, and no tag costs one."""

import io
import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from serve_model import encode

from serve.contract.images import load_image
from serve.contract.orientation import on_its_side

WIDE = Image.fromarray(np.repeat(np.array([[[200, 40, 40], [40, 60, 200]]], np.uint8), 32, 1).repeat(40, 0))
TAG, SHORT = 0x0112, 3


def exif_block(*entries: tuple[int, int, int, bytes], order: str = "<", at: int = 8) -> bytes:
    """One directory at byte `at`, of (tag, type, count, value); values of more than 4 bytes follow it."""
    after = at + 2 + 12 * len(entries) + 4
    directory, values = struct.pack(f"{order}H", len(entries)), b""
    for tag, kind, count, value in entries:
        field = value.ljust(4, b"\0")
        if len(value) > 4:
            field = struct.pack(f"{order}I", after + len(values))
            values += value
        directory += struct.pack(f"{order}HHI", tag, kind, count) + field
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at)
    return b"Exif\0\0" + head.ljust(at, b"\0") + directory + b"\0" * 4 + values


def turned(value: int = 6) -> tuple[int, int, int, bytes]:
    return TAG, SHORT, 1, struct.pack("<H", value)


def pixels_of(data: bytes) -> NDArray[np.int_]:
    return np.asarray(load_image(data)).astype(int)


def is_turned(data: bytes) -> bool:
    """Clockwise by a quarter: what was left is above."""
    pixels = pixels_of(data)
    if pixels.shape == (40, 64, 3):
        return False
    assert pixels.shape == (64, 40, 3)
    assert (pixels[4, :, 0] > pixels[-4, :, 0] + 100).all()
    return True


TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 99: 1}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("tag", [0x010F, 0x0132, 0x011A, 0x9C9C, 0x8769, 0x8825, 0xA005, 0xFFFF])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_odd_tag_beside_it_costs_neither_the_photograph_nor_the_turn(tag: int, file_format: str) -> None:
    rng = np.random.default_rng(tag)
    for kind, size in TYPES.items():
        for count in (0, 1, 2, 5, 1 << 30):
            value = rng.bytes(size * min(count, 5))
            entries = sorted([turned(), (tag, kind, count, value)])
            assert is_turned(encode(WIDE, file_format, exif=exif_block(*entries))), (kind, count)


@pytest.mark.parametrize("pointer", [0, 8, 60_000, 0xFFFFFFFF])
@pytest.mark.parametrize("tag", [0x8769, 0x8825, 0xA005, 0x014A])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pointer_that_leads_nowhere_or_in_circles_costs_neither(tag: int, pointer: int) -> None:
    block = exif_block(turned(), (tag, 4, 1, struct.pack("<I", pointer)))
    assert is_turned(encode(WIDE, "JPEG", exif=block))


@pytest.mark.parametrize(
    "entry",
    [
        (TAG, 1, 1, b"\6"),
        (TAG, 2, 2, b"6\0"),
        (TAG, 4, 1, struct.pack("<I", 6)),
        (TAG, 5, 1, struct.pack("<II", 6, 1)),
        (TAG, 7, 1, b"\6"),
        (TAG, 8, 1, struct.pack("<h", 6)),
        (TAG, 11, 1, struct.pack("<f", 6)),
        (TAG, 12, 1, struct.pack("<d", 6)),
        (TAG, SHORT, 2, struct.pack("<HH", 6, 0)),
        (TAG, SHORT, 0, b""),
        turned(0),
        turned(9),
        turned(0x0600),
    ],
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tag_that_browsers_do_not_read_is_left_alone(
    entry: tuple[int, int, int, bytes], file_format: str
) -> None:
    assert not is_turned(encode(WIDE, file_format, exif=exif_block(entry)))


@pytest.mark.parametrize(
    "block",
    [
        exif_block((TAG, SHORT, 1, struct.pack(">H", 6)), order=">"),
        exif_block(turned(), at=26),
        exif_block(turned(9), turned(6)),
        b"Exif\0\0" + exif_block(turned()),
        exif_block(turned(), (0x010F, 2, 4, b"abc\0"))[:-8],  # it ends within the next entry
    ],
    ids=["Motorola", "directory further on", "the first is no value", "two heads", "cut"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_tag_is_found_where_browsers_find_it(block: bytes) -> None:
    assert is_turned(encode(WIDE, "JPEG", exif=block))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block", [b"", b"I", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08", b"rubbish, and more"]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_block_that_is_none_costs_no_photograph(block: bytes, file_format: str) -> None:
    assert not is_turned(encode(WIDE, file_format, exif=b"Exif\0\0" + block))


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description xmlns:tiff="t"{}></x:xmpmeta>'


@pytest.mark.parametrize(
    "inside",
    [' tiff:Orientation="6"/>', " tiff:Orientation = '6'/>", "><tiff:Orientation> 6 </tiff:Orientation>"],
)
@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_xmp_turns_where_there_is_no_exif(inside: str, file_format: str) -> None:
    xmp = XMP.format(inside).encode()
    assert is_turned(encode(WIDE, file_format, xmp=xmp))
    assert not is_turned(encode(WIDE, file_format, xmp=xmp, exif=exif_block(turned(1))))


@pytest.mark.parametrize(
    ("file_format", "has_exif"),
    [("JPEG", True), ("PNG", True), ("WEBP", True), ("AVIF", True), ("AVIF", False)],
)
def test_xmp_that_a_program_left_behind_turns_no_upright_picture(file_format: str, has_exif: bool) -> None:
    """It turned the pixels and took the tag out of EXIF, as sharp does. An AVIF's rotation is no tag."""
    block = exif_block((0x010F, 2, 4, b"abc\0")) if has_exif else b""
    xmp = XMP.format(' tiff:Orientation="6"/>').encode()
    if file_format == "PNG":
        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode())
        data = encode(WIDE, "PNG", pnginfo=text, exif=block)
    else:
        data = encode(WIDE, file_format, xmp=xmp, **({"exif": block} if block else {}))
    assert not is_turned(data)


def tiff(*odd: tuple[int, int, int, bytes]) -> bytes:
    """Uncompressed, its pixels at byte 1000."""

    def number(tag: int, value: int) -> tuple[int, int, int, bytes]:
        return tag, 4, 1, struct.pack("<I", value)

    plain = {256: 64, 257: 40, 258: 8, 262: 2, 273: 1000, 277: 3, 278: 40, 279: 64 * 40 * 3}
    entries = sorted([*(number(tag, value) for tag, value in plain.items()), *odd])
    return exif_block(*entries)[6:].ljust(1000, b"\0") + WIDE.tobytes()


@pytest.mark.parametrize(
    "odd",
    [
        (700, SHORT, 1, b"\6\0"),
        (700, SHORT, 3, b"\6\0\6\0\6\0"),
        (700, 2, 12, b"Orientation\0"),
        (700, 5, 1, struct.pack("<II", 6, 1)),
        (0x8769, 9, 1, struct.pack("<i", -25)),
        (0x8825, 16, 1, b"\xff" * 8),
        (0x8769, 4, 1, struct.pack("<I", 8)),
        (0x8769, 12, 1, struct.pack("<d", 1e300)),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_odd_tag_costs_no_tiff(odd: tuple[int, int, int, bytes]) -> None:
    assert not is_turned(tiff(odd))
    assert is_turned(tiff(odd, turned()))


def test_an_avif_is_turned_by_its_own_rotation_alone() -> None:
    exif = Image.Exif()
    exif[TAG] = 6  # Pillow writes it as the rotation
    assert is_turned(encode(WIDE, "AVIF", exif=exif, quality=95))
    # under another number until it is written
    block = exif_block((0x0111, *turned()[1:]))
    data = encode(WIDE, "AVIF", exif=block, quality=95)
    assert not is_turned(data.replace(b"\x11\x01\x03\0", b"\x12\x01\x03\0"))  # and so it is no rotation


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_odd_tag_costs_no_avif_whose_exif_and_rotation_differ(kind: int) -> None:
    """Pillow then writes the EXIF block again, while it opens the file."""
    block = exif_block((0x010F, kind, 1, b"\xff" * TYPES[kind]), (0x0111, *turned()[1:]))
    data = encode(WIDE, "AVIF", exif=block, quality=95)
    assert not is_turned(data.replace(b"\x11\x01\x03\0", b"\x12\x01\x03\0"))  # and so it is no rotation


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_what_lies_on_its_side_is_known_before_it_is_turned(file_format: str, value: int) -> None:
    exif = Image.Exif()
    exif[TAG] = value
    data = encode(WIDE, file_format, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        size = image.size[::-1] if on_its_side(image) else image.size
    assert load_image(data).size == size

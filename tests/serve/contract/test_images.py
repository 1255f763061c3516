"""From file bytes to an image: the photographer's upright, and no file that kills."""

import io
import os
import re
import signal
import socket
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import MEGABYTE, linux, resident_memory_grows_below
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin
from serve_model import (
    broken_files,
    encode,
    lying_jpeg,
    noise,
    open_descriptors_unchanged,
    png_header,
    solid,
)

from serve.contract import images
from serve.contract.errors import UserError
from serve.contract.images import (
    MAX_FILE_BYTES,
    MAX_MEGAPIXELS,
    load_accepted,
    load_image,
    memory_note,
    read_image_file,
)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """A read that blocks for ever becomes a failure."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"still blocked after {seconds} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def pixels_of(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(load_image(data))


# -- load_image: what a picture looks like ---------------------------------------------------------------

# Orientation -> how a camera stores the upright picture, from the EXIF standard's "row 0 is the visual
# left-hand side, column 0 is the visual top" and so on.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("file_format", ["WEBP", "GIF"])
def test_what_an_animations_first_frame_leaves_out_is_white(file_format: str) -> None:
    """As viewers show it on their background."""
    if file_format == "WEBP":
        first = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
        first.paste((0, 0, 255, 255), (4, 4, 12, 12))
        opaque = Image.new("RGBA", (16, 16), (0, 255, 0, 255))
        data = encode(first, "WEBP", save_all=True, append_images=[opaque], lossless=True)
    else:
        frame = Image.new("P", (8, 8), 1)
        frame.putpalette([200, 40, 40, 0, 0, 255])
        still = bytearray(encode(frame, "GIF"))
        still[6:10] = struct.pack("<HH", 16, 16)
        box = still.index(b",") + 1
        still[box : box + 4] = struct.pack("<HH", 4, 4)
        data = bytes(still)
    pixels = pixels_of(data)
    assert pixels[8, 8].tolist() == [0, 0, 255]
    assert pixels[0, 0].tolist() == pixels[15, 15].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({322: 10_000, 323: 10_000}, "tiles"),
        ({262: 6, 530: (2, 2)}, "YCbCr"),
        ({284: 2, 258: (16, 16, 16)}, "planes"),
        ({284: 2, 262: 0}, "planes"),
        ({273: (8, 0)}, "missing strips"),
        ({254: 1, 330: 8}, "thumbnail"),
        ({258: (8,), 339: (2,)}, "unsigned"),
    ],
)
def test_tiffs_that_would_be_misread_or_fill_the_memory_are_refused(
    tags: dict[int, Any], reason: str
) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    with Image.open(
        io.BytesIO(encode(solid((200, 40, 40)), "TIFF", tiffinfo=info)), formats=["TIFF"]
    ) as image:
        image.tag_v2.update(tags)  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=reason):
            images._check_size(image, b"", MAX_MEGAPIXELS)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_photographs_stand_upright(orientation: int, file_format: str) -> None:
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:24, :32] = (255, 0, 0)
    upright[:24, 32:] = (0, 255, 0)
    upright[24:, :32] = (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    pixels = pixels_of(encode(stored, file_format, exif=exif, quality=95))
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 5


@pytest.mark.parametrize("exif", [b"Exif\0\0rubbish", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_picture(exif: bytes) -> None:
    assert pixels_of(encode(solid((200, 0, 0)), "JPEG", exif=exif)).shape == (30, 20, 3)


def palette(transparent: bool) -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 250, 128, 3])
    return encode(image, "PNG", **({"transparency": 1} if transparent else {}))


def animation(file_format: str) -> bytes:
    frames = [solid(colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    return encode(frames[0], file_format, save_all=True, append_images=frames[1:])


PICTURES = {
    "grey": (encode(Image.new("L", (4, 4), 100), "PNG"), (100, 100, 100)),
    "grey JPEG": (encode(Image.new("L", (8, 8), 100), "JPEG"), (100, 100, 100)),
    "black and white": (encode(Image.new("1", (4, 4), 1), "PNG"), (255, 255, 255)),
    "16-bit grey PNG": (encode(Image.new("I;16", (4, 4), 0x6480), "PNG"), (0x64, 0x64, 0x64)),
    "16-bit grey TIFF": (encode(Image.new("I;16", (4, 4), 0x6480), "TIFF"), (0x64, 0x64, 0x64)),
    "big-endian TIFF": (encode(Image.new("I;16B", (4, 4), 0x6480), "TIFF"), (0x64, 0x64, 0x64)),
    "16-bit colour": (b"P6 1 1 65535\n" + bytes([0x64, 0x64, 0x32, 0x32, 0xFF, 0xFF]), (0x64, 0x32, 0xFF)),
    "palette": (palette(transparent=False), (250, 128, 3)),
    "palette, transparent": (palette(transparent=True), (255, 255, 255)),
    "RGB, transparent": (
        encode(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        (255, 255, 255),
    ),
    "RGBA, half": (encode(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "PNG"), (255, 127, 127)),
    "RGBA, clear": (encode(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG"), (255, 255, 255)),
    "grey, half": (encode(Image.new("LA", (4, 4), (0, 128)), "PNG"), (127, 127, 127)),
    "CMYK JPEG": (
        encode(solid((250, 0, 0), (16, 16)).convert("CMYK"), "JPEG", quality=95),
        (250, 0, 0),
    ),
    "animated GIF": (animation("GIF"), (255, 0, 0)),
    "animated WebP": (animation("WEBP"), (255, 0, 0)),
    "telephone's MPO": (animation("MPO"), (255, 0, 0)),
    "AVIF": (encode(solid((255, 0, 0)), "AVIF"), (255, 0, 0)),
    "BMP": (encode(solid((1, 2, 3)), "BMP"), (1, 2, 3)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_becomes_the_rgb_that_a_viewer_shows(name: str) -> None:
    data, colour = PICTURES[name]
    image = load_image(data)
    assert image.mode == "RGB"
    exact = not any(kind in name for kind in ("CMYK", "WebP", "MPO", "AVIF"))
    np.testing.assert_allclose(image.getpixel((0, 0)), colour, atol=0 if exact else 6)


def test_16_bit_grey_keeps_its_shades() -> None:
    """Pillow's own conversion clips everything above 255 of 65535 to white."""
    ramp = np.arange(0, 65536, 128, np.uint16).reshape(16, 32)
    pixels = pixels_of(encode(Image.fromarray(ramp), "PNG"))
    np.testing.assert_array_equal(pixels[..., 0], ramp >> 8)


def test_16_bit_grey_whose_white_is_zero_is_no_negative() -> None:
    tiff = encode(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "TIFF", tiffinfo={262: 0})
    assert (pixels_of(tiff) == 255 - (40_000 >> 8)).all()


def test_the_transparent_shade_of_16_bit_grey_is_white() -> None:
    shades = np.array([[1000, 40_000]], np.uint16)
    pixels = pixels_of(encode(Image.fromarray(shades), "PNG", transparency=1000))
    assert pixels[0, :, 0].tolist() == [255, 40_000 >> 8]


@pytest.mark.parametrize("maximum", [1023, 65535])
def test_pgm_of_more_than_8_bits_keeps_its_shades(maximum: int) -> None:
    levels = np.array([[0, maximum // 2, maximum]], ">u2")
    pixels = pixels_of(b"P5\n3 1\n%d\n" % maximum + levels.tobytes())
    assert pixels[0, :, 0].tolist() == [0, 127, 255]


def test_a_transparent_line_of_two_million_pixels_is_laid_over_white_too() -> None:
    """It is wider than what is laid at once."""
    image = load_image(encode(Image.new("LA", (2_000_000, 1), (0, 0)), "PNG"))
    assert image.getpixel((1_999_999, 0)) == (255, 255, 255)


@linux
def test_transparency_costs_no_more_memory_than_the_picture_and_its_result() -> None:
    """512 MB of 8000x8000 pixels at 4 bytes, twice."""
    file = encode(Image.new("RGBA", (7999, 8000), (10, 20, 30, 100)), "PNG")
    with resident_memory_grows_below(700 << 20):
        assert load_image(file).getpixel((7998, 7999)) == (159, 163, 167)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_32_bit_grey_is_refused_not_guessed(mode: str) -> None:
    with pytest.raises(UserError, match=f"'{mode}'.*8 bits"):
        load_image(encode(Image.new(mode, (4, 4)), "TIFF"))


# -- load_image: what is no picture ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in broken_files() if name != "empty.jpg"])
def test_what_is_no_image_is_refused_with_the_reason(name: str) -> None:
    data, reason = broken_files()[name]
    with pytest.raises(UserError, match=re.escape(reason)):
        load_image(data)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM"]), st.floats(0, 0.9))
def test_a_file_cut_short_is_never_a_picture(file_format: str, part: float) -> None:
    data = encode(noise(64, 48), file_format)
    with pytest.raises(UserError):
        load_image(data[: int(len(data) * part)])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 200), st.sampled_from(sorted(PICTURES)))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_the_bytes_the_only_error_is_imageerror(junk: bytes, offset: int, name: str) -> None:
    data = PICTURES[name][0]
    with suppress(UserError):
        load_image(data[:offset] + junk + data[offset + len(junk) :])


@pytest.mark.parametrize("filler", [b"\0", b"\xff"])
@pytest.mark.parametrize("file_format", ["WEBP", "WEBP, lossless", "AVIF", "JPEG"])
def test_equal_bytes_in_place_of_the_second_half_are_no_picture(file_format: str, filler: bytes) -> None:
    """As an interrupted copy or a flash memory leaves them: they are valid codes of pixels."""
    name, lossless = file_format.partition(",")[0], "lossless" in file_format
    data = encode(noise(200, 150), name, quality=90, lossless=lossless)
    half = len(data) // 2
    with pytest.raises(UserError):
        load_image(data[:half] + filler * (len(data) - half))
    assert load_image(data + bytes(500)).tobytes() == load_image(data).tobytes()


def test_postscript_named_jpg_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ghostscript, ran = tmp_path / "gs", tmp_path / "ran"
    ghostscript.write_text(f"#!/bin/sh\ntouch {ran}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError):
        load_image(broken_files()["postscript.jpg"][0])
    assert not ran.exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lying_jpeg(8000, 8000), "8000x8000 .*truncated"),
        (lying_jpeg(8000, 8000, "MPO"), "8000x8000 .*truncated"),
        (png_header(8001, 8000), f"8001x8000.*{MAX_MEGAPIXELS:g} .*--max-megapixels"),
        (encode(Image.new("1", (9000, 9000)), "PNG"), f"9000x9000.*{MAX_MEGAPIXELS:g} .*--max-megapixels"),
    ],
    ids=["JPEG header", "MPO header", "PNG header", "81 megapixels in kilobytes"],
)
@linux
def test_a_small_file_cannot_cost_hundreds_of_megabytes(data: bytes, reason: str) -> None:
    assert len(data) < 20_000
    with resident_memory_grows_below(30 * MEGABYTE), pytest.raises(UserError, match=reason):
        load_image(data)


def test_the_limit_of_pixels_is_the_callers_and_none_for_what_was_accepted(tmp_path: Path) -> None:
    data = encode(Image.new("RGB", (200, 100)), "PNG")
    assert load_image(data, max_megapixels=0.02).size == (200, 100)
    with pytest.raises(UserError, match=r"200x100.*0\.0199 .*--max-megapixels"):
        load_image(data, max_megapixels=0.0199)
    (tmp_path / "large.png").write_bytes(encode(Image.new("1", (8001, 8000)), "PNG"))
    assert load_accepted(tmp_path / "large.png").size == (8001, 8000)


def test_the_memory_of_larger_images_is_named() -> None:
    assert memory_note(MAX_MEGAPIXELS, 16) == ""
    assert "6.9 GB" in memory_note(108, 16)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_an_all_white_jpeg_is_not_taken_for_truncated(mode: str, progressive: bool) -> None:
    """The fewest bytes that a whole picture can have."""
    white = Image.new(mode, (4000, 4000), "white")
    data = encode(white, "JPEG", quality=30, optimize=True, progressive=progressive)
    image = load_image(data)
    assert image.size == (4000, 4000)
    assert image.resize((1, 1)).getpixel((0, 0)) == (255, 255, 255)


def test_no_setting_of_the_calling_program_hides_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(noise(64, 48), "JPEG")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UserError, match="LOAD_TRUNCATED_IMAGES"):
        load_image(data[: len(data) // 2])


# -- read_image_file -------------------------------------------------------------------------------------


def test_a_regular_file_is_read_whole(tmp_path: Path) -> None:
    contents = os.urandom(3_000_000)
    (tmp_path / "x.jpg").write_bytes(contents)
    (tmp_path / "link.jpg").symlink_to("x.jpg")
    assert read_image_file(tmp_path / "x.jpg") == read_image_file(tmp_path / "link.jpg") == contents


def test_reading_a_small_file_takes_a_small_buffer(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"x" * 1000)
    tracemalloc.start()
    try:
        read_image_file(tmp_path / "x.jpg")
        assert tracemalloc.get_traced_memory()[1] < 2 * MEGABYTE
    finally:
        tracemalloc.stop()


def special_file(kind: str, path: Path) -> None:
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)  # a socket's path must be short: relative to the current directory
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "empty":
        path.touch()
    elif kind == "over the limit":
        path.touch()
        os.truncate(path, MAX_FILE_BYTES + 1)  # sparse


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        ("FIFO", UserError, "not a regular file"),
        ("folder", OSError, "Is a directory"),
        ("socket", OSError, "No such device"),
        ("device", UserError, "not a regular file"),
        ("link to itself", OSError, "symbolic links"),
        ("missing", OSError, "No such file"),
        ("empty", UserError, "empty file"),
        ("over the limit", UserError, "over the limit of"),
    ],
)
@linux
def test_what_is_no_regular_file_is_an_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: type[Exception], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    special_file(kind, tmp_path / "x.jpg")
    with within(5), open_descriptors_unchanged(), pytest.raises(error, match=reason):
        read_image_file(tmp_path / "x.jpg")

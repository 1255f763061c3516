"""From file bytes to pixels: torchvision's numbers, the photographer's upright, and no file that kills."""

import os
import re
import signal
import socket
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from serve_model import (
    broken_files,
    encode,
    lying_jpeg,
    noise,
    open_descriptors_unchanged,
    png_header,
    solid,
)
from torchvision.transforms import InterpolationMode, v2

from serve.contract.preprocess import (
    MAX_FILE_BYTES,
    MAX_PIXELS,
    MODES,
    RESAMPLING,
    ImageError,
    Preprocess,
    list_images,
    load_image,
    read_image_file,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MEGABYTE = 2**20


@contextmanager
def resident_memory_grows_below(limit: int) -> Iterator[None]:
    """Bytes, at the peak; Pillow's pixels are not Python objects, so the kernel is asked."""

    def status(field: str) -> int:
        line = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert line is not None
        return int(line[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    yield
    growth = status("VmHWM") - before
    assert growth < limit, f"{growth / MEGABYTE:.0f} MB"


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


# -- Preprocess ------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 400), st.floats(1, 8), st.booleans()).map(
    lambda s: (s[0], int(s[0] * s[1])) if s[2] else (int(s[0] * s[1]), s[0])
)


def torchvision_crop(image: Image.Image, preprocess: Preprocess) -> NDArray[np.uint8]:
    interpolation = InterpolationMode(preprocess.interpolation)
    resize = v2.Resize(preprocess.resize_size, interpolation, antialias=True)
    return np.asarray(v2.CenterCrop(preprocess.size)(resize(image)))


def largest_difference(image: Image.Image, preprocess: Preprocess) -> int:
    ours = preprocess(image)
    assert ours.shape == (preprocess.size, preprocess.size, 3)
    assert ours.dtype == np.uint8
    return int(np.abs(ours.astype(int) - torchvision_crop(image, preprocess)).max())


@settings(max_examples=100, deadline=None)
@given(shape=shapes, size=st.integers(1, 256), margin=st.integers(0, 60), seed=st.integers(0, 99))
def test_crop_is_torchvisions_to_two_grey_levels(
    shape: tuple[int, int], size: int, margin: int, seed: int
) -> None:
    """On the hardest picture: every pixel differs from its neighbours."""
    assert largest_difference(noise(*shape, seed=seed), Preprocess("crop", size, size + margin)) <= 2


@pytest.mark.parametrize("shape", [(500, 374), (374, 500), (256, 256), (224, 225), (3000, 2001)])
def test_crop_of_photograph_sizes_is_torchvisions_to_one_grey_level(shape: tuple[int, int]) -> None:
    assert largest_difference(noise(*shape), Preprocess()) <= 1


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos"])
@settings(max_examples=40, deadline=None)
@given(shape=shapes, size=st.integers(1, 256), margin=st.integers(0, 60))
def test_sharper_filters_are_torchvisions_too(
    interpolation: str, shape: tuple[int, int], size: int, margin: int
) -> None:
    """Away from black and white, where Pillow clips their overshoot, before or after the other pass."""
    image = noise(*shape).point(lambda grey: 80 + grey * 96 // 255)
    assert largest_difference(image, Preprocess("crop", size, size + margin, interpolation)) <= 2


@given(shape=shapes, size=st.integers(1, 256))
@settings(max_examples=40, deadline=None)
def test_squash_is_torchvisions_resize_bit_for_bit(shape: tuple[int, int], size: int) -> None:
    image = noise(*shape)
    expected = v2.Resize((size, size), antialias=True)(image)
    np.testing.assert_array_equal(Preprocess("squash", size)(image), np.asarray(expected))


@pytest.mark.parametrize(
    "shape", [(80, 60), (60, 80), (64, 64), (7, 3), (1, 1), (333, 100), (1, 900), (30000, 1)]
)
@pytest.mark.parametrize("size", [64, 65])
def test_pad_keeps_the_aspect_ratio_centred_on_black(shape: tuple[int, int], size: int) -> None:
    pixels = Preprocess("pad", size)(Image.new("RGB", shape, "white"))
    assert pixels.shape == (size, size, 3)
    rows, columns = np.flatnonzero(pixels.any((1, 2))), np.flatnonzero(pixels.any((0, 2)))
    assert (pixels[np.ix_(rows, columns)] == 255).all()
    for found, side in ((columns, shape[0]), (rows, shape[1])):
        assert len(found) == max(1, round(size * side / max(shape)))
        assert abs(found[0] - (size - 1 - found[-1])) <= 1


@pytest.mark.parametrize("mode", MODES)
def test_pixels_do_not_depend_on_the_system_or_the_call_before(mode: str) -> None:
    """Same input, same output, and the image given is left as it was."""
    image, preprocess = noise(50, 31), Preprocess(mode, 16, 20)
    before = image.tobytes()
    first = preprocess(image)
    preprocess(noise(9, 9, seed=1))
    np.testing.assert_array_equal(preprocess(image), first)
    assert image.tobytes() == before


@pytest.mark.parametrize("mode", MODES)
@linux
def test_a_line_of_30000_pixels_costs_no_memory(mode: str) -> None:
    """Resizing its short side to 256 first, as usual, would need gigabytes."""
    for shape in ((30000, 1), (1, 30000)):
        image = Image.new("RGB", shape, (10, 200, 30))
        with resident_memory_grows_below(20 * MEGABYTE):
            pixels = Preprocess(mode)(image)
        assert pixels.max((0, 1)).tolist() == [10, 200, 30]


preprocesses = st.builds(
    Preprocess,
    mode=st.sampled_from(MODES),
    size=st.integers(1, 4096),
    resize_size=st.integers(4096, 8192),
    interpolation=st.sampled_from(sorted(RESAMPLING)),
)


@given(preprocesses)
def test_a_dictionary_and_back(preprocess: Preprocess) -> None:
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess


def test_a_dictionary_with_unknown_or_missing_fields_is_refused() -> None:
    values = Preprocess().to_dict()
    with pytest.raises(ValueError, match="'rotate'"):
        Preprocess.from_dict(values | {"rotate": 90})
    del values["interpolation"]
    with pytest.raises(ValueError, match="preprocess fields"):
        Preprocess.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "stretch"}, "mode 'stretch' is none of crop, squash, pad"),
        ({"interpolation": "nearest"}, "'nearest' is none of bilinear, bicubic, lanczos"),
        ({"size": 0}, "size 0 is outside 1..4096"),
        ({"size": 5000, "mode": "pad"}, "size 5000 is outside 1..4096"),
        ({"size": 224, "resize_size": 223}, r"resize_size 223 is outside 224 \(size\)..8192"),
        ({"resize_size": 9000}, "resize_size 9000 is outside"),
    ],
)
def test_a_bad_value_is_named_with_its_limits(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**values)


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
    with pytest.raises(ImageError, match=f"mode '{mode}' have no defined white; save 8 bits"):
        load_image(encode(Image.new(mode, (4, 4)), "TIFF"))


# -- load_image: what is no picture ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in broken_files() if name != "empty.jpg"])
def test_what_is_no_image_is_refused_with_the_reason(name: str) -> None:
    data, reason = broken_files()[name]
    with pytest.raises(ImageError, match=re.escape(reason)):
        load_image(data)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM"]), st.floats(0, 0.9))
def test_a_file_cut_short_is_never_a_picture(file_format: str, part: float) -> None:
    data = encode(noise(64, 48), file_format)
    with pytest.raises(ImageError):
        load_image(data[: int(len(data) * part)])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 200), st.sampled_from(sorted(PICTURES)))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_the_bytes_the_only_error_is_imageerror(junk: bytes, offset: int, name: str) -> None:
    data = PICTURES[name][0]
    with suppress(ImageError):
        load_image(data[:offset] + junk + data[offset + len(junk) :])


def test_postscript_named_jpg_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ghostscript, ran = tmp_path / "gs", tmp_path / "ran"
    ghostscript.write_text(f"#!/bin/sh\ntouch {ran}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ImageError, match="not an image file"):
        load_image(broken_files()["postscript.jpg"][0])
    assert not ran.exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lying_jpeg(8000, 8000), "claims 8000x8000 pixels in .* bytes: truncated"),
        (lying_jpeg(8000, 8000, "MPO"), "claims 8000x8000 pixels in .* bytes: truncated"),
        (png_header(8001, 8000), f"8001x8000 pixels are over the limit of {MAX_PIXELS}; scale it down"),
        (encode(Image.new("1", (9000, 9000)), "PNG"), "9000x9000 pixels are over the limit"),
    ],
    ids=["JPEG header", "MPO header", "PNG header", "81 megapixels in kilobytes"],
)
@linux
def test_a_small_file_cannot_cost_hundreds_of_megabytes(data: bytes, reason: str) -> None:
    assert len(data) < 20_000
    with resident_memory_grows_below(30 * MEGABYTE), pytest.raises(ImageError, match=reason):
        load_image(data)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_an_all_white_jpeg_is_not_taken_for_truncated(mode: str, progressive: bool) -> None:
    """The fewest bytes that a whole picture can have."""
    white = Image.new(mode, (4000, 4000), "white")
    data = encode(white, "JPEG", quality=30, optimize=True, progressive=progressive)
    image = load_image(data)
    assert image.size == (4000, 4000)
    assert image.resize((1, 1)).getpixel((0, 0)) == (255, 255, 255)


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
        ("FIFO", ImageError, "not a regular file"),
        ("folder", OSError, "Is a directory"),
        ("socket", OSError, "No such device"),
        ("device", ImageError, "not a regular file"),
        ("link to itself", OSError, "symbolic links"),
        ("missing", OSError, "No such file"),
        ("empty", ImageError, "empty file"),
        ("over the limit", ImageError, "over the limit of"),
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


# -- list_images -----------------------------------------------------------------------------------------


def make_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))


def test_images_are_found_in_every_folder_sorted_whatever_the_case(tmp_path: Path) -> None:
    images = ["10.jpg", "2.JPG", "Z.Png", "a/b/c/deep.webp", "a/x.jpeg", "a-b.tiff", "d.jpg/inside.gif"]
    others = ["notes.txt", "jpg", ".jpg", "a/model.onnx", "x.jpg.part"]
    make_files(tmp_path, *images, *others)
    (tmp_path / "empty").mkdir()
    listing = list_images(tmp_path)
    assert listing.paths == sorted(images)
    assert listing.ignored == {".txt": 1, ".onnx": 1, ".part": 1, "": 2}
    assert listing.problems == {}
    assert list_images(tmp_path, recursive=False).paths == ["10.jpg", "2.JPG", "Z.Png", "a-b.tiff"]


ODD_NAMES = ["a b .jpg", "고양이.jpg", "two\nlines.jpg", "tab\t.jpg", 'quote"d.jpg', "=cmd.jpg", "._x.jpg"]
ODD_NAMES += ["e\u0301.jpg", "\u00e9.jpg", "-rf.jpg", "x" * 251 + ".jpg", os.fsdecode(b"caf\xe9.jpg")]


def test_any_file_name_is_found_and_can_be_opened(tmp_path: Path) -> None:
    make_files(tmp_path, *ODD_NAMES, *(f"{name} folder/{name}" for name in ODD_NAMES[:-2]))
    listing = list_images(tmp_path)
    assert len(listing.paths) == 2 * len(ODD_NAMES) - 2
    assert listing.paths == sorted(listing.paths)
    assert set(ODD_NAMES) < set(listing.paths)
    assert {p: read_image_file(tmp_path / p) for p in listing.paths} == {
        p: os.fsencode(p) for p in listing.paths
    }


def test_linked_folders_are_reported_not_followed_and_linked_files_are_kept(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    make_files(outside, "secret.jpg")
    make_files(root, "real.jpg", "sub/real.jpg")
    for name, target in {
        "loop": ".",
        "sub/up": "..",
        "out": "../outside",
        "named.jpg": "sub",
        "file.jpg": "../outside/secret.jpg",
        "self.jpg": "self.jpg",
        "dangling.jpg": "nowhere.jpg",
    }.items():
        (root / name).symlink_to(target)
    listing = list_images(root)
    assert listing.problems == dict.fromkeys(
        ("loop", "sub/up", "out", "named.jpg"), "linked folder, not followed"
    )
    assert listing.paths == ["dangling.jpg", "file.jpg", "real.jpg", "self.jpg", "sub/real.jpg"]


def test_system_folders_are_counted_and_not_entered(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg", "@eaDir/a.jpg/t.jpg", "b/@EADIR/x.jpg", "LOST+FOUND/x.jpg", "Thumbs.db")
    (tmp_path / "b" / ".snapshot").symlink_to(tmp_path)
    listing = list_images(tmp_path)
    assert listing.paths == ["a.jpg"]
    assert listing.system == {"@eaDir": 1, "@EADIR": 1, "LOST+FOUND": 1, ".snapshot": 1}
    assert listing.ignored == {"": 1}
    assert listing.problems == {}


def test_a_folder_that_cannot_be_listed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may run as root, whom no folder refuses: the system call is made to."""
    make_files(tmp_path, "a.jpg", "locked/hidden.jpg", "z/b.jpg")
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path) == tmp_path / "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_images(tmp_path)
    assert listing.paths == ["a.jpg", "z/b.jpg"]
    assert listing.problems == {"locked/": "cannot list this folder: Permission denied"}
    with pytest.raises(PermissionError):
        list_images(tmp_path / "locked")


def test_a_root_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg")
    with pytest.raises(FileNotFoundError):
        list_images(tmp_path / "missing")
    with pytest.raises(NotADirectoryError):
        list_images(tmp_path / "a.jpg")

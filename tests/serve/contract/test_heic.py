"""HEIC comes out as its picture, upright, with the package that reads it, and names the extra without."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import heic_files
import numpy as np
import pytest
from numpy.typing import NDArray

from serve.contract.errors import UserError
from serve.contract.heic import heic_version, is_heic
from serve.contract.images import load_image
from serve.contract.listing import list_images
from serve.inputs.sources import open_source
from train.data.pixel_cache import _upright_size
from train.data.reading import DECODER, Shrink
from train.data.scan import scan

RED, GREEN, BLUE, WHITE = (200, 30, 30), (30, 180, 30), (30, 30, 200), (240, 240, 240)
BRANDS = [b"heic", b"heix", b"hevc", b"heim", b"mif1\0\0\0\0heic", b"msf1\0\0\0\0msf1hevc"]


def corners(data: bytes) -> NDArray[np.int64]:
    """[4, 3]: upper left, upper right, lower left, lower right."""
    pixels = np.asarray(load_image(data)).astype(int)
    return np.array([pixels[y, x] for y in (4, -4) for x in (4, -4)])


@pytest.mark.parametrize(
    ("data", "size", "expected"),
    [
        (heic_files.UPRIGHT, (48, 32), (RED, GREEN, BLUE, WHITE)),
        (heic_files.ON_ITS_SIDE, (32, 48), (BLUE, RED, WHITE, GREEN)),
        (heic_files.DEEP, (48, 32), (RED, GREEN, BLUE, WHITE)),
        (heic_files.GREY, (48, 32), ((81,) * 3, (118,) * 3, (49,) * 3, (240,) * 3)),
    ],
    ids=["8 bits", "on its side", "10 bits", "grey"],
)
def test_a_picture_comes_out_upright_in_rgb(
    data: bytes, size: tuple[int, int], expected: tuple[tuple[int, int, int], ...], tmp_path: Path
) -> None:
    image = load_image(data)
    assert (image.mode, image.size) == ("RGB", size)
    assert np.abs(corners(data) - np.array(expected)).max() <= 2
    (tmp_path / "telephone.jpg").write_bytes(data)
    assert _upright_size(tmp_path / "telephone.jpg") == size
    assert Shrink(8)(load_image(data, Shrink(8).decode)).shape[:2] == Shrink(8).size(size)[::-1]


def test_threads_decode_the_same_pixels() -> None:
    expected = load_image(heic_files.UPRIGHT).tobytes()
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: load_image(heic_files.UPRIGHT).tobytes(), range(40)))
    assert found == {expected}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_that_is_cut_or_damaged_is_an_error_of_one_line(share: float) -> None:
    data = heic_files.UPRIGHT
    for damaged in (data[: int(share * len(data))], data[:36] + b"\0" * 36 + data[72:]):
        with pytest.raises(UserError) as raised:
            load_image(damaged)
        assert "\n" not in str(raised.value)


def test_zeros_in_place_of_the_end_are_an_error() -> None:
    data = heic_files.UPRIGHT
    with pytest.raises(UserError, match="truncated"):
        load_image(data[:480] + bytes(len(data) - 480))
    assert load_image(data + bytes(100)).tobytes() == load_image(data).tobytes()


def test_the_limit_of_pixels_is_read_from_the_header() -> None:
    with pytest.raises(UserError, match=r"48x32.*--max-megapixels"):
        load_image(heic_files.UPRIGHT, max_megapixels=0.001)


@pytest.mark.parametrize("brand", BRANDS)
def test_it_is_known_by_its_brands(brand: bytes) -> None:
    box = b"ftyp" + brand.ljust(16, b"\0")
    assert is_heic((len(box) + 4).to_bytes(4, "big") + box + b"\0" * 100)
    assert not is_heic(b"\0\0\0\x18ftypavif\0\0\0\0heic")
    assert not is_heic(b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif")


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "a.heif", "b.hif", "c.jpg"])
def test_without_the_package_each_file_has_a_row_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif.as_plugin", None)
    (tmp_path / name).write_bytes(heic_files.UPRIGHT)
    assert list_images(tmp_path).paths == [name]
    assert len(open_source(str(tmp_path)).inventory) == 1
    with pytest.raises(UserError, match=r"HEIC.*\[heic\]"):
        load_image(heic_files.UPRIGHT)
    assert "[heic]" in scan(tmp_path, [name], tmp_path / "cache").bad[name]


def test_caches_of_decoded_images_depend_on_the_package() -> None:
    ((package, version),) = heic_version().items()
    assert f"{package} {version}" in DECODER

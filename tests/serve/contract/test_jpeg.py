"""What is counted is the first picture of a JPEG, whatever lies within its segments and behind its end."""

import pytest
from hostile_images import many_scans
from PIL import Image
from serve_model import encode, noise
from test_orientation import exif_block, turned
from test_profiles import P3

from serve.contract.errors import UserError
from serve.contract.images import MAX_JPEG_SCANS, load_image, load_whole
from serve.contract.jpeg import scans_and_end
from serve.contract.preprocess import Preprocess

SCAN_MARKS = b"\xff\xda" * (MAX_JPEG_SCANS + 1)
BASELINE = encode(noise(64, 48), "JPEG")
PROGRESSIVE = encode(noise(64, 48), "JPEG", progressive=True)


@pytest.mark.parametrize("data", [BASELINE, PROGRESSIVE])
def test_what_telephones_put_behind_the_picture_is_not_counted(data: bytes) -> None:
    trailer = b"MotionPhoto_Data\0\0\0\x18ftypmp42" + SCAN_MARKS + BASELINE
    assert scans_and_end(data + trailer) == scans_and_end(data)
    assert scans_and_end(data)[1] == len(data)
    assert load_image(data + trailer).tobytes() == load_image(data).tobytes()


def test_scan_marks_within_metadata_are_not_counted() -> None:
    """Thumbnails are JPEGs of their own, and a comment may be anything."""
    data = encode(noise(64, 48), "JPEG", exif=b"Exif\0\0" + SCAN_MARKS, comment=SCAN_MARKS)
    assert scans_and_end(data) == (1, len(data))
    assert load_image(data).size == (64, 48)


def test_the_other_pictures_of_an_mpo_are_not_counted() -> None:
    others = [noise(64, 48, seed) for seed in range(1, 30)]
    data = encode(noise(64, 48), "MPO", save_all=True, append_images=others, progressive=True)
    assert data.count(b"\xff\xda") > MAX_JPEG_SCANS
    assert load_image(data).size == (64, 48)


def test_restarts_and_fill_bytes_are_passed_over() -> None:
    with_restarts = encode(noise(64, 48), "JPEG", restart_marker_blocks=1)
    assert scans_and_end(with_restarts) == (1, len(with_restarts))
    filled = BASELINE[:-2] + b"\xff\xff\xff" + BASELINE[-2:]
    assert scans_and_end(filled) == (1, len(filled))


@pytest.mark.parametrize("before", [b"", b"\xff\x02\xff\xff", b"\xff\x01", b"\xff\xd0\xff\x00"])
def test_a_scan_bomb_is_refused_whatever_stands_between_its_scans(before: bytes) -> None:
    bomb = many_scans(MAX_JPEG_SCANS + 1)
    last = bomb.rindex(b"\xff\xda")
    with pytest.raises(UserError, match=f"scans .*{MAX_JPEG_SCANS}"):
        load_image(bomb[:last] + before + bomb[last:])


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


UNREADABLE = {
    "Photoshop's, cut": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
    "a profile without a number": segment(0xE2, b"ICC_PROFILE\0"),
    "a short JFIF": segment(0xE0, b"JFIF\0"),
    "a short Adobe": segment(0xEE, b"Adobe"),
    "a resolution that is no number": segment(
        0xE1, exif_block((0x011A, 2, 1, b"\0"), (0x0128, 3, 1, b"\2\0"))
    ),
}


@pytest.mark.parametrize("quality", [90, 95, 98, 100])
def test_zeros_in_place_of_the_second_half_are_no_picture(quality: int) -> None:
    """As an interrupted copy leaves them: zeros are valid codes."""
    data = encode(noise(200, 150), "JPEG", quality=quality)
    with pytest.raises(UserError, match="truncated"):
        load_image(data[: len(data) // 2] + bytes(len(data) // 2))
    assert load_image(data + bytes(500)).size == (200, 150)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 5}, {"subsampling": 0}])
def test_an_end_mark_in_place_of_the_last_rows_is_no_picture(mode: str, options: dict[str, int]) -> None:
    """libjpeg shows them in grey. Grey that is in the file is a picture."""
    image = noise(200, 150).convert(mode)
    data = encode(image, "JPEG", **options)
    for share in (0.1, 0.5, 0.9):
        cut = data[: int(share * len(data))] + data[-2:]
        for decode in (load_whole, Preprocess("squash", 16).decode):
            with pytest.raises(UserError, match="truncated"):
                load_image(cut + b"MotionPhoto_Data", decode)
    image.paste(128 if mode == "L" else (128, 128, 128), (0, 40, 200, 150))
    for whole in (image, Image.new(mode, (200, 150), image.getpixel((0, 149)))):
        assert load_image(encode(whole, "JPEG", **options)).getpixel((199, 149)) == (128, 128, 128)


def test_a_profile_and_an_orientation_survive_metadata_that_cannot_be_read() -> None:
    xmp = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    data = encode(noise(64, 48), "JPEG", icc_profile=P3, xmp=xmp)
    damaged = data[:2] + UNREADABLE["a short Adobe"] + data[2:]
    image = load_image(damaged)
    assert image.size == load_image(data).size == (48, 64)
    assert image.info["icc_profile"] == P3


@pytest.mark.parametrize("name", UNREADABLE)
def test_metadata_that_cannot_be_read_costs_no_photograph(name: str) -> None:
    plain = encode(noise(64, 48), "JPEG", exif=exif_block(turned()), quality=90)
    without_jfif = plain[:2] + plain[20:]
    data = without_jfif[:2] + UNREADABLE[name] + without_jfif[2:]
    expected = load_image(plain)
    assert expected.size == (48, 64)
    if "resolution" in name:  # it is the first EXIF block, and says nothing of the orientation
        expected = expected.transpose(Image.Transpose.ROTATE_90)
    assert load_image(data).tobytes() == expected.tobytes()

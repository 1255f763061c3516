"""A picture in a format that is not read is called by its name, and no other file is."""

from collections import Counter
from pathlib import Path

import pytest

from serve.contract.errors import UserError
from serve.contract.formats import NO_SUFFIX, kind_of_other, unread_pictures
from serve.contract.images import load_image
from serve.inputs.sources import open_source

BEGINNINGS = {
    "HEIF": [b"\0\0\0\x18ftypmif1\0\0\0\0mif1miaf", b"\0\0\0\x18ftypmsf1"],
    "JPEG XL": [b"\xff\x0a\xfa\x7f", b"\0\0\0\x0cJXL \r\n\x87\n"],
    "JPEG 2000": [b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51\0\x2f"],
    "a video": [b"\0\0\0\x18ftypmp42", b"\0\0\0\x18ftypqt  "],
    "a web page": [b"<!DOCTYPE html><html>", b"\n <HTML lang='en'>", b"\xef\xbb\xbf<html>"],
    "text": [b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>".ljust(64)],
    "zeros": [b""],
    "DICOM": [bytes(128) + b"DICM"],
    "GIF": [b"GIF89a"],
    "TIFF": [b"II*\0", b"MM\0*", b"MM\0+"],
    "JPEG, or": [b"\xff\xd8\xff\xe0"],
    "PNG": [b"\x89PNG\r\n\x1a\n"],
    "PAM": [b"P7\nWIDTH 2\n"],
    "git lfs pull": [b"version https://git-lfs.github.com/spec/v1\n"],
}


@pytest.mark.parametrize(("name", "beginnings"), BEGINNINGS.items())
def test_the_error_names_what_the_file_is(name: str, beginnings: list[bytes]) -> None:
    for beginning in beginnings:
        with pytest.raises(UserError, match=name):
            load_image(beginning + b"\0" * 200)


@pytest.mark.parametrize("data", [b'{"error": "not found"}', b"in/a.jpg\nin/b.jpg\n", "d\u00e9".encode()])
def test_a_text_is_shown(data: bytes) -> None:
    with pytest.raises(UserError, match="text") as raised:
        load_image(data)
    assert repr(data.decode().strip()) in str(raised.value)


@pytest.mark.parametrize(
    "name",
    ["a.JP2", "b.heic_large", "c.jxl", "d.dng", "e.pbm", "f.tga"]
    + ["g.jpg_large", "h.jpg!d", "i.jpg.1", "j.JPG ", "k.jpeg~", "l.png-medium"],
)
def test_what_looks_like_a_picture_is_not_left_out_without_a_word(tmp_path: Path, name: str) -> None:
    kind = kind_of_other(f"folder/{name}")
    (line,) = unread_pictures(Counter([kind, ".txt"]))
    assert f"{kind} 1" in line
    assert "; " in line  # what to do
    assert ".txt" not in line
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "ok.jpg").write_bytes(b"x")
    source = open_source(str(tmp_path))
    assert (len(source.inventory), source.ignored) == (1, 1)
    assert source.inputs.left_out.others == {kind: 1}


@pytest.mark.parametrize(
    "name",
    ["a.txt", "a.jpg.txt", "a.jpg.json", "a.png.npy", "a.jpg.part", "README", ".jpg", "._a.heic", "jpg.1"],
)
def test_what_lies_beside_pictures_is_no_warning(name: str) -> None:
    assert unread_pictures(Counter([kind_of_other(name)])) == []


def test_files_without_a_suffix_are_counted_and_hidden_ones_and_the_systems_are_not() -> None:
    assert {kind_of_other(f"cat/{name}") for name in ("0001", "IMG 2", "README")} == {NO_SUFFIX}
    assert {kind_of_other(f"cat/{name}") for name in (".jpg", ".DS_Store", "Thumbs.db", "Icon\r")} == {""}

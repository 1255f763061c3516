"""Lists of images as Windows, spreadsheets and other tools write them."""

from pathlib import Path

import pytest

from serve.inputs.lists import listed_in_csv, listed_lines

PATHS = ["in/a.jpg", "in/b c.jpg"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for path in PATHS:
        (tmp_path / path).touch()
    return tmp_path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_read(folder: Path, encoding: str) -> None:
    (folder / "l.txt").write_bytes("\r\n".join([*PATHS, ""]).encode(encoding))
    assert list(listed_lines(str(folder / "l.txt"))) == PATHS
    (folder / "l.csv").write_bytes("\r\n".join(["Path,label", *(f"{p},x" for p in PATHS)]).encode(encoding))
    assert list(listed_in_csv(str(folder / "l.csv"))) == PATHS


def test_a_text_that_is_no_utf_16_after_its_mark_is_named(folder: Path) -> None:
    (folder / "l.txt").write_bytes("in/a.jpg\n".encode("utf-16") + b"\x00\xd8\n")
    with pytest.raises(ValueError, match=r"l\.txt: line \d .*UTF-16"):
        list(listed_lines(str(folder / "l.txt")))

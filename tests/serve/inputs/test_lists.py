"""Lists of images as Windows, spreadsheets and other tools write them."""

from pathlib import Path

import pytest

from serve.contract.errors import UserError
from serve.inputs.lists import ListedFiles, listed_in_csv, listed_lines

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


@pytest.mark.parametrize(
    "lines",
    [
        [path.replace("/", "\\") for path in PATHS],
        [f" {path}  " for path in PATHS],
        [f"{path} 0" for path in PATHS],
        [f"{path}\t0" for path in PATHS],
        [f"{path},0" for path in PATHS],
        [f'"{path}"' for path in PATHS],
        ["# images of today", *PATHS],
    ],
    ids=["backslash", "spaces", "label", "tab", "comma", "quotes", "comment"],
)
def test_lines_that_are_no_paths_are_refused_with_the_first_one(folder: Path, lines: list[str]) -> None:
    (folder / "l.txt").write_text("\n".join([*lines, ""]))
    with pytest.raises(UserError, match=r"l\.txt: line 1\b") as raised:
        list(listed_lines(str(folder / "l.txt")))
    assert repr(lines[0]) in str(raised.value)
    assert lines[0].startswith("#") or repr(PATHS[0]) in str(raised.value)


@pytest.mark.parametrize("line", ["gone.jpg", "#1.jpg", "s3://bucket/in/a.jpg 0"])
def test_a_path_of_no_file_has_an_error_row_later(folder: Path, line: str) -> None:
    (folder / "l.txt").write_text(f"{line}\nin/a.jpg\n")
    assert list(listed_lines(str(folder / "l.txt"))) == [line, "in/a.jpg"]


def test_a_text_that_is_no_utf_16_after_its_mark_is_named(folder: Path) -> None:
    (folder / "l.txt").write_bytes("in/a.jpg\n".encode("utf-16") + b"\x00\xd8\n")
    with pytest.raises(ValueError, match=r"l\.txt: line \d .*UTF-16"):
        list(listed_lines(str(folder / "l.txt")))


def test_a_path_may_begin_with_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "in" / "a.jpg").write_bytes(b"pixels")
    (folder / "list.txt").write_text("~/in/a.jpg\n")
    inputs = ListedFiles(str(folder / "list.txt"), str(folder))
    (entry,) = inputs.entries()
    assert inputs.read(entry) == b"pixels"


def test_a_contests_sample_is_a_list_of_its_test_images(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "test"):
        (folder / part).mkdir()
        for i in range(6):
            (folder / part / f"{i}.jpg").touch()
    (folder / "sample_submission.csv").write_text("id,label\n" + "".join(f"{i},0.5\n" for i in range(6)))
    listed = list(listed_in_csv(str(folder / "sample_submission.csv")))
    assert listed == [f"test/{i}.jpg" for i in range(6)]
    assert "'id' in test/, with .jpg added" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "in\\a.jpg;x\nin\\b c.jpg;y\n",
        "id\tFile\n1\tin/a.jpg\n2\tin/b c.jpg\n",
        "path,label\na,x\nb c,y\n",
        "in/a.jpg 3\nin/b c.jpg 4\n",
    ],
    ids=["backslashes without header", "tabs", "without folder and suffix", "spaces"],
)
def test_other_columns_and_forms_are_read_as_label_files_are(folder: Path, text: str) -> None:
    (folder / "l.csv").write_text(text)
    assert list(listed_in_csv(str(folder / "l.csv"))) == PATHS


def test_two_columns_of_images_are_refused_until_one_is_called_path(folder: Path) -> None:
    (folder / "l.csv").write_text("before,after\nin/a.jpg,in/b c.jpg\nin/b c.jpg,in/a.jpg\n")
    with pytest.raises(UserError, match=r"'before', 'after'.*path"):
        list(listed_in_csv(str(folder / "l.csv")))
    (folder / "l.csv").write_text("before,path\nin/a.jpg,in/b c.jpg\nin/b c.jpg,in/a.jpg\n")
    assert list(listed_in_csv(str(folder / "l.csv"))) == PATHS[::-1]

"""Lists of images as Windows, spreadsheets and other tools write them."""

import json
from pathlib import Path

import pytest

from serve.contract.errors import UserError
from serve.inputs.lists import ListedFiles, listed_in_table, listed_lines
from serve.inputs.sources import open_source

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
    assert list(listed_in_table(str(folder / "l.csv"))) == PATHS


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
    listed = list(listed_in_table(str(folder / "sample_submission.csv")))
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
    assert list(listed_in_table(str(folder / "l.csv"))) == PATHS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.tsv", "path\tlabel\nin/a.jpg\tx\nin/b c.jpg\ty\n"),
        ("l.JSONL", '{"file_name": "in/a.jpg"}\n{"file_name": "in/b c.jpg"}\n'),
        ("l.json", '[{"path": "in/a.jpg"}, {"path": "in/b c.jpg"}]'),
    ],
)
def test_tables_of_other_suffixes_are_lists_and_no_images(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    source = open_source(str(folder / name))
    assert [entry.name for entry in source.inventory.entries()] == PATHS


def test_urls_beside_names_without_folder_and_suffix_stay_urls(folder: Path) -> None:
    (folder / "l.csv").write_text("path\na\nb c\nhttps://host/c.png\n")
    assert list(listed_in_table(str(folder / "l.csv"))) == [*PATHS, "https://host/c.png"]


def test_a_json_list_of_texts_is_called_so(folder: Path) -> None:
    for indent in (None, 1):
        (folder / "l.json").write_text(json.dumps(PATHS, indent=indent))
        with pytest.raises(UserError, match="JSON object"):
            open_source(str(folder / "l.json"))


def test_paths_from_the_current_folder_are_refused_and_not_a_list_of_missing_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "lists").mkdir()
    lines = "\n".join(PATHS)
    for name, text in (("l.txt", lines), ("l.csv", f"path\n{lines}"), ("m.csv", f"image\n{lines}")):
        (folder / "lists" / name).write_text(text)
        with pytest.raises(UserError, match=rf"lists/{name}.*{folder}/in/a\.jpg"):
            open_source(f"lists/{name}")
    (folder / "in" / "l.csv").write_text(f"path\n{lines}")  # the folder around the list's own
    assert list(listed_in_table("in/l.csv")) == ["a.jpg", "b c.jpg"]


def test_a_table_in_a_text_file_and_old_line_ends_are_refused(folder: Path) -> None:
    (folder / "l.txt").write_text("path,label\nin/a.jpg,x\nin/b c.jpg,y\n")
    with pytest.raises(UserError, match=r"line 2.*'in/a\.jpg'.*\.csv"):
        open_source(str(folder / "l.txt"))
    (folder / "l.txt").write_bytes("\r".join(PATHS).encode())
    with pytest.raises(UserError, match=r"line 1.*'in/a\.jpg'"):
        open_source(str(folder / "l.txt"))
    (folder / "l.txt").write_text("1.jpg 65\n2.jpg 970\n")  # of images in another folder
    with pytest.raises(UserError, match=r"line 1.*\.csv"):
        open_source(str(folder / "l.txt"))


def test_lines_of_spaces_are_empty_and_a_tar_file_is_no_image(folder: Path) -> None:
    (folder / "l.txt").write_text("in/a.jpg\n  \nshard.tar\n")
    source = open_source(str(folder / "l.txt"))
    assert [bool(entry.problem) for entry in source.inventory.entries()] == [False, True]


def test_two_columns_of_images_are_refused_until_one_is_called_path(folder: Path) -> None:
    (folder / "l.csv").write_text("before,after\nin/a.jpg,in/b c.jpg\nin/b c.jpg,in/a.jpg\n")
    with pytest.raises(UserError, match=r"'before', 'after'.*path"):
        list(listed_in_table(str(folder / "l.csv")))
    (folder / "l.csv").write_text("before,path\nin/a.jpg,in/b c.jpg\nin/b c.jpg,in/a.jpg\n")
    assert list(listed_in_table(str(folder / "l.csv"))) == PATHS[::-1]

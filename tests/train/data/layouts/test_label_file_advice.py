"""A label file that cannot be read is refused with a command, and what the command writes can be read."""

import subprocess
from pathlib import Path

import pytest

from serve.contract.errors import UserError
from train.data.layouts.label_file import read

NAMES = ("cat", "dog")
PATHS = [f"train/{i:02}.jpg" for i in range(6)]
ROWS = [(path, NAMES[i % 2]) for i, path in enumerate(PATHS)]


def lines(header: str, rows: list[tuple[str, ...]], separator: str = ",") -> str:
    return "\r\n".join([header, *(separator.join(row) for row in rows)]) + "\r\n"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (lines("path;label", ROWS, ";"), "utf-8"),
        (lines("path\tlabel", ROWS, "\t"), "utf-16"),
        (lines("path|label", ROWS, "|"), "utf-8-sig"),
        (lines("filename,class", ROWS), "utf-8-sig"),
        (lines("filename,class", ROWS), "utf-16"),
        (lines("class,filename", [row[::-1] for row in ROWS]), "utf-8"),
        (lines("", ROWS).lstrip(), "utf-8"),
        (lines("id,breed", [(path[6:8], label) for path, label in ROWS]), "utf-8"),
        (lines("label,path", [(label, path[:8]) for path, label in ROWS]), "utf-8"),
        (lines("path,label", [(path.replace("/", "\\"), label) for path, label in ROWS]), "utf-8"),
        (lines("path,label", [(f"{path}  ", label) for path, label in ROWS]), "utf-8"),
    ],
    ids=[
        "semicolons",
        "tabs",
        "bars",
        "names",
        "UTF-16",
        "turned",
        "headless",
        "ids",
        "suffix",
        "backslash",
        "spaces",
    ],
)
def test_the_command_makes_it_readable(tmp_path: Path, text: str, encoding: str) -> None:
    for path in PATHS:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    file = tmp_path / "my labels.csv"
    file.write_bytes(text.encode(encoding))
    for _ in range(3):  # each command mends one thing
        try:
            assert read(file).labels == dict(ROWS)
            break
        except UserError as error:
            subprocess.run(str(error).rpartition("run: ")[2], shell=True, check=True)
            file = file.with_name(f"{file.stem}.new.csv")
    assert ".new" in file.name


@pytest.mark.parametrize(("label", "encoding"), [("\uace0\uc591\uc774", "cp949"), ("caf\u00e9", "latin-1")])
def test_the_encoding_is_named_with_the_command_that_converts(
    tmp_path: Path, label: str, encoding: str
) -> None:
    file = tmp_path / "m.csv"
    file.write_bytes(f"path,label\na.jpg,dog\nb.jpg,{label}\n".encode(encoding))
    with pytest.raises(UserError, match=f"m.csv line 3: .*UTF-8.*{label}.*{encoding}") as caught:
        read(file)
    subprocess.run(str(caught.value).rpartition("run: ")[2], shell=True, check=True)
    assert read(tmp_path / "m.new.csv").labels["b.jpg"] == label


def test_a_lost_file_is_no_fault_of_the_label_file(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jpg").touch()
    (tmp_path / "2.jpg").touch()
    (tmp_path / "m.csv").write_text("path,label\n1.jpg,cat\n2.jpg,dog\n")
    assert list(read(tmp_path / "m.csv").labels) == ["1.jpg", "2.jpg"]

"""Everything that --images can name becomes sorted names and their bytes."""

import os
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest

from serve.contract.errors import UserError
from serve.inputs.files import expand_braces
from serve.inputs.inventory import Entry
from serve.inputs.sources import Source, open_source


def make(root: Path, *names: str) -> None:
    """Files whose contents are their own names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))


def make_tar(path: Path, folder: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.add(folder / name, name)


def contents(source: Source) -> dict[str, str]:
    return {entry.name: os.fsdecode(source.read(entry)) for entry in source.inventory.entries()}


def contents_of_readable(source: Source) -> dict[str, str]:
    found = {}
    for entry in source.inventory.entries():
        with suppress(OSError):
            found[entry.name] = source.read(entry).decode()
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_with_its_problems_in_their_order(folder: Path) -> None:
    make(folder, "in/b.jpg", "in/a/z.png", "in/a-b.jpg", "in/notes.txt")
    (folder / "in" / "a0").symlink_to(".")
    source = open_source("in")
    entries = list(source.inventory.entries())
    assert [e.name for e in entries] == ["a-b.jpg", "a/z.png", "a0", "b.jpg"]
    assert [e.problem for e in entries] == ["", "", "linked folder, not followed", ""]
    assert source.ignored == 1
    assert source.read(entries[1]) == b"in/a/z.png"
    with pytest.raises(UserError, match="linked folder"):
        source.read(entries[2])


SYSTEM = ["lost+found", "@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", ".Trash-1000", ".snapshot"]
SYSTEM += [".ipynb_checkpoints", "System Volume Information", ".thumbnails", "@Recycle"]


@pytest.mark.parametrize("images", ["in", "in/**/*", "in/{a,b,*}/**/*.jpg", "in.tar"])
def test_system_folders_are_no_inputs_and_are_counted(folder: Path, images: str) -> None:
    names = ["in/a/1.jpg", "in/lost and found/2.jpg"]
    make(folder, *names, *(f"in/{name}/deep/x.jpg" for name in SYSTEM), "in/a/@eaDir/1.jpg/y.jpg")
    make_tar(folder / "in.tar", folder, "in")
    source = open_source(images)
    assert sorted(contents(source).values()) == names
    visible = [name for name in SYSTEM if not name.startswith(".")]  # * stands for no leading dot
    expected = dict.fromkeys(visible if "*" in images else SYSTEM, 1) | {"@eaDir": 2}
    assert source.system == expected


def test_a_system_folder_that_is_named_is_read(folder: Path) -> None:
    make(folder, "in/.snapshot/daily/a.jpg", "in/b/@eaDir/x.jpg/y.jpg", "c/@eaDir/.snapshot/z.jpg")
    assert list(contents(open_source("in/.snapshot"))) == ["daily/a.jpg"]
    assert list(contents(open_source("in/*/@eaDir/*/*.jpg"))) == ["b/@eaDir/x.jpg/y.jpg"]
    (folder / "l.txt").write_text("in/.snapshot/daily/a.jpg")
    assert list(contents(open_source("l.txt"))) == ["in/.snapshot/daily/a.jpg"]
    with pytest.raises(ValueError, match=r"'c'.*@eaDir 1"):
        open_source("c")


def test_a_mounted_config_map_is_scored_once_by_the_names_of_its_links(folder: Path) -> None:
    make(folder, "in/..2026_01_31_10_00_00.123/a.jpg")
    os.symlink("..2026_01_31_10_00_00.123", "in/..data")
    os.symlink("..data/a.jpg", "in/a.jpg")
    assert list(contents(open_source("in"))) == ["a.jpg"]


def test_a_folder_of_links_alone_names_the_cure(folder: Path) -> None:
    make(folder, "store/a.jpg")
    (folder / "in").mkdir()
    os.symlink("../store", "in/cat")
    with pytest.raises(ValueError, match=r"in.*cat.*\.txt"):
        open_source("in")


@pytest.mark.parametrize("images", ["in/x.jpg", "./in/x.jpg", "/ABSOLUTE/in/x.jpg"])
def test_one_image(folder: Path, images: str) -> None:
    make(folder, "in/x.jpg")
    assert contents(open_source(images.replace("/ABSOLUTE", str(folder)))) == {"x.jpg": "in/x.jpg"}


def test_one_image_in_the_current_directory(folder: Path) -> None:
    make(folder, "x.dat")
    assert contents(open_source("x.dat")) == {"x.dat": "x.dat"}


@pytest.mark.parametrize("name", ["lists/mine.txt", "lists/mine.lst", "lists/mine.csv"])
def test_a_list_is_relative_to_its_own_folder(folder: Path, name: str) -> None:
    make(folder, "lists/b.jpg", "lists/a/x.jpg", "up.jpg", "absolute.jpg")
    paths = ["b.jpg", "a/x.jpg", "../up.jpg", f"{folder}/absolute.jpg", "b.jpg"]
    lines = ["label,path", *(f"cat,{path}" for path in paths)] if name.endswith("csv") else [*paths, ""]
    (folder / name).write_text("\n".join(lines))
    source = open_source(name)
    assert contents(source) == {
        f"{folder}/absolute.jpg": "absolute.jpg",
        "../up.jpg": "up.jpg",
        "a/x.jpg": "lists/a/x.jpg",
        "b.jpg": "lists/b.jpg",
    }
    assert list(contents(source)) == sorted(paths[:4])
    assert source.inventory.repeated == 1


def test_one_image_in_several_spellings_is_scored_once_by_a_name_that_was_listed(folder: Path) -> None:
    make(folder, "a.jpg", "in/b.jpg", "c.jpg", "..x.jpg")
    paths = ["./a.jpg", "a.jpg", "in//b.jpg", "./in/./b.jpg", f"{folder}/in/b.jpg", "./c.jpg", "..x.jpg"]
    (folder / "l.txt").write_text("\n".join(paths))
    source = open_source("l.txt")
    assert sorted(contents(source).values()) == ["..x.jpg", "a.jpg", "c.jpg", "in/b.jpg"]
    assert set(contents(source)) < set(paths)
    assert "./c.jpg" in contents(source)
    assert source.inventory.repeated == 3
    assert contents(open_source("{in,./in}/b.jpg")) == {"in/b.jpg": "in/b.jpg"}


def test_two_files_whose_names_look_alike_are_two_inputs_and_one_file_is_one(folder: Path) -> None:
    composed, decomposed = "caf\u00e9.jpg", "cafe\u0301.jpg"
    make(folder, composed, decomposed)
    (folder / "l.txt").write_text(f"{composed}\n{decomposed}\n./{composed}")
    source = open_source("l.txt")
    assert len(contents(source)) == 2
    assert source.inventory.repeated == 1
    (folder / decomposed).unlink()
    (folder / decomposed).hardlink_to(folder / composed)  # as a Mac's file system has it
    assert len(contents(open_source("l.txt"))) == 1


def test_lists_made_on_windows_and_of_names_that_are_not_utf8(folder: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.jpg")
    make(folder, "a b.jpg", odd, "two\nlines.jpg", '"q".jpg')
    (folder / "l.txt").write_bytes(b"\xef\xbb\xbfa b.jpg\r\ncaf\xe9.jpg\r\n\r\n")
    assert contents(open_source("l.txt")) == {"a b.jpg": "a b.jpg", odd: odd}
    (folder / "l.csv").write_bytes(
        b'\xef\xbb\xbfpath\r\na b.jpg\r\ncaf\xe9.jpg\r\n"two\nlines.jpg"\r\n"""q"".jpg"\r\n'
    )
    assert set(contents(open_source("l.csv"))) == {"a b.jpg", odd, "two\nlines.jpg", '"q".jpg'}
    (folder / "powershell.csv").write_bytes(b'\xef\xbb\xbf"path","label"\r\n"a b.jpg","x"\r\n')
    assert set(contents(open_source("powershell.csv"))) == {"a b.jpg"}


def test_a_listed_file_that_is_missing_is_an_input_all_the_same(folder: Path) -> None:
    (folder / "l.txt").write_text("missing.jpg")
    source = open_source("l.txt")
    assert [e.name for e in source.inventory.entries()] == ["missing.jpg"]
    with pytest.raises(FileNotFoundError):
        source.read(Entry("missing.jpg"))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("l.txt", b"", r"l\.txt"),
        ("l.txt", b"\n\n", r"l\.txt"),
        ("l.txt", b"a.jpg\n\0\1\2", r"l\.txt: line 2 "),
        ("l.txt", b"x" * 100_000, "line 1 "),
        ("l.csv", b"", "'path'"),
        ("l.csv", b"file,label\na.jpg,cat\n", r"'path'.*\['file', 'label'\]"),
        ("l.csv", b"label,path\ncat,a.jpg\ncat\n", "line 3 "),
        ("l.csv", b"label,path\ncat,\n", "line 2 "),
        ("l.csv", b'path\na.jpg\n"b.jpg\nc.jpg\n', "unexpected end of data"),
        ("l.csv", b"path,path\na.jpg,b.jpg\n", "2 columns 'path'"),
    ],
)
def test_a_list_that_is_none_is_refused(folder: Path, name: str, text: bytes, reason: str) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(ValueError, match=reason):
        open_source(name)


# -- tar files and patterns ------------------------------------------------------------------------------


@pytest.fixture
def shards(folder: Path) -> Path:
    make(folder, "x.jpg", "a/y.png", "t.cls")
    for number in (8, 9, 10):
        make_tar(folder / "shards" / f"{number:02}.tar", folder, "x.jpg", "a/y.png", "t.cls")
    make_tar(folder / "shards" / "more" / "11.tar", folder, "x.jpg")
    return folder


def test_a_tar_files_images_are_named_after_it(shards: Path) -> None:
    source = open_source("shards/08.tar")
    assert contents(source) == {"08.tar/a/y.png": "a/y.png", "08.tar/x.jpg": "x.jpg"}
    assert source.ignored == 1


@pytest.mark.parametrize(
    "pattern", ["shards/*.tar", "shards/{08..10}.tar", "shards/{08,09,10}.tar", "shards/[01]?.tar"]
)
def test_patterns_of_tar_files(shards: Path, pattern: str) -> None:
    names = list(contents(open_source(pattern)))
    assert names == [f"{n}.tar/{m}" for n in ("08", "09", "10") for m in ("a/y.png", "x.jpg")]


def test_alternatives_may_each_begin_at_the_root(shards: Path) -> None:
    source = open_source(f"{{{shards}/a,{shards}/shards}}/*")
    assert next(iter(contents(source))) == f"{shards}/a/y.png".lstrip("/")
    assert len(source.inventory) == 1 + 3 * 2


def test_names_are_relative_to_the_folder_before_the_pattern(shards: Path) -> None:
    assert list(contents(open_source(f"{shards}/*/more/*.tar"))) == ["shards/more/11.tar/x.jpg"]
    assert "more/11.tar/x.jpg" in contents(open_source(f"{shards}/shards/**/*.tar"))


def test_a_pattern_from_the_root_on(folder: Path) -> None:
    make(folder, "in/a.jpg", "in/b.jpg")
    first, rest = str(folder)[1:].split("/", 1)
    for pattern in (f"/[{first[0]}]{first[1:]}/{rest}/in/*.jpg", f"/{{{first}/{rest}/in/a,nowhere/b}}.jpg"):
        source = open_source(pattern)
        assert contents_of_readable(source)[f"{first}/{rest}/in/a.jpg"] == "in/a.jpg"


def test_a_pattern_of_all_folders_follows_no_links(folder: Path) -> None:
    make(folder, "in/a.jpg", "in/deep/b.jpg")
    os.symlink(folder / "in", folder / "in" / "again")
    assert list(contents(open_source("in/**/*.jpg"))) == ["a.jpg", "deep/b.jpg"]
    os.symlink(folder / "in", folder / "link")
    assert "deep/b.jpg" in contents(open_source("link/**/*.jpg"))


def test_a_missing_tar_file_of_a_brace_pattern_is_an_error_row(shards: Path) -> None:
    entries = {e.name: e.problem for e in open_source("shards/{09..12}.tar").inventory.entries()}
    assert "No such file" in entries["11.tar"]
    assert entries["12.tar"] == entries["11.tar"]
    assert entries["10.tar/x.jpg"] == ""


def test_images_can_be_matched_too_and_a_name_with_brackets_is_itself(folder: Path) -> None:
    make(folder, "in/a[1].jpg", "in/a1.jpg", "in/b.jpg")
    assert contents(open_source("in/a[1].jpg")) == {"a[1].jpg": "in/a[1].jpg"}
    assert list(contents(open_source("in/*.jpg"))) == ["a1.jpg", "a[1].jpg", "b.jpg"]


def test_a_folder_with_brackets_is_itself_where_nothing_else_matches(folder: Path) -> None:
    make(folder, "set [1]/a.jpg", "set [1]/b.txt")
    assert contents(open_source("set [1]/*.jpg")) == {"set [1]/a.jpg": "set [1]/a.jpg"}


def test_folders_that_a_pattern_matches_are_reported(folder: Path) -> None:
    make(folder, "in/a.jpg", "in/deep/b.jpg")
    for pattern, count in (("in/*", 1), ("in/{a.jpg,deep}", 1), ("in/**/*.jpg", 0)):
        source = open_source(pattern)
        assert "a.jpg" in contents(source)
        assert [line[0] for line in source.describe_left_out()] == ["1"] * count


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a", ["a"]),
        ("{1..3}", ["1", "2", "3"]),
        ("{08..10}.tar", ["08.tar", "09.tar", "10.tar"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("x{,.jpg}", ["x", "x.jpg"]),
        ("{3..1}", []),
        ("a{b", ["a{b"]),
    ],
)
def test_braces(pattern: str, expanded: list[str]) -> None:
    assert expand_braces(pattern) == expanded


def test_braces_that_stand_for_millions_are_refused() -> None:
    with pytest.raises(ValueError, match="1000000"):
        expand_braces("{0..99999999999}")


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ("missing", "--images 'missing'"),
        ("empty", "'empty': 0 "),
        ("texts", r"'texts': 1 .*\.txt 1"),
        ("archives", r"'archives': 3 .*without a suffix.*\.txt file.*'FOLDER/\*.tar'$"),
        ("outer.tar", r"'outer.tar': 1 .*unpack \.tar$"),
        ("*s", r"no file but 2 folders"),
        ("{texts,archives}", r"no file but 2 folders"),
        ("*.nothing", r"--images '\*.nothing'"),
        ("{u,v}.tar", r"--images '{u,v}\.tar'"),
        ("{3..1}.tar", r"--images '{3\.\.1}\.tar'"),
        ("x.tar.gz", r"x\.tar\.gz"),
        ("x.tar", r"'x.tar': 0 .*1 problems.*x\.tar"),
        ("fifo", "--images 'fifo'"),
        ("fifo.tar", "fifo.tar"),
    ],
)
def test_nothing_to_score_is_an_error_that_says_why(folder: Path, images: str, reason: str) -> None:
    (folder / "empty").mkdir()
    make(folder, "texts/a.txt", "x.tar.gz", "x.tar", "archives/a.zip", "archives/b.tar", "archives/1")
    make_tar(folder / "outer.tar", folder, "x.tar")
    os.mkfifo(folder / "fifo")
    os.mkfifo(folder / "fifo.tar")
    with pytest.raises(ValueError, match=reason):
        open_source(images)


def test_folders_nested_more_deeply_than_pythons_calls(folder: Path) -> None:
    depth = 1200
    os.makedirs("deep")
    os.chdir("deep")
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    Path("x.jpg").write_bytes(b"deep")
    os.chdir(folder)
    try:
        assert contents(open_source("deep")) == {"d/" * depth + "x.jpg": "deep"}
    finally:
        subprocess.run(["rm", "-rf", "deep"], check=True)  # shutil.rmtree cannot, nor can pytest

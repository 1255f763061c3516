"""A local file is written whole or not at all, and errors name it."""

import errno
import os
from pathlib import Path

import pytest

from serve.contract.files import (
    atomic_path,
    atomic_write,
    cache_folder,
    check_folder_writable,
    expand_arguments,
)


def test_a_file_appears_whole(tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    with atomic_write(output) as file:
        file.write("고양이\n".encode())
        file.flush()
        assert not output.exists()
    assert output.read_text(encoding="utf-8") == "고양이\n"
    assert os.listdir(tmp_path) == ["out.csv"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_while_writing_leaves_nothing_new(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "old.csv").write_text("yesterday's\n")
    for name in ("old.csv", "new.csv"):
        with pytest.raises(error), atomic_write(tmp_path / name) as file:  # noqa: PT012
            file.write(b"half of to")
            raise error
    assert os.listdir(tmp_path) == ["old.csv"]
    assert (tmp_path / "old.csv").read_text() == "yesterday's\n"


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EIO, "Input/output error"), False),  # perhaps of what is read meanwhile
    ],
    ids=repr,
)
def test_a_full_disk_is_an_error_that_names_the_output(tmp_path: Path, error: OSError, named: bool) -> None:
    with pytest.raises(OSError, match=str(error.strerror)) as raised, atomic_write(tmp_path / "out.csv"):
        raise error
    assert raised.value.filename == (str(tmp_path / "out.csv") if named else None)


def test_two_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    """Two pods can run the same job at once, on a shared folder, both with process id 1."""
    output = tmp_path / "out.csv"
    with atomic_write(output) as first:
        first.write(b"first, a longer text\n")
        with atomic_write(output) as second:
            second.write(b"second\n")
        assert output.read_text() == "second\n"
    assert output.read_text() == "first, a longer text\n"
    assert os.listdir(tmp_path) == ["out.csv"]


def test_a_finished_file_can_be_read_by_others(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "out.csv"):
        pass
    (tmp_path / "plain").touch()
    assert (tmp_path / "out.csv").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_is_written_through(tmp_path: Path) -> None:
    """/dev/stdout is a link: it must not become a file."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "latest.csv").symlink_to("folder/out.csv")
    with atomic_write(tmp_path / "latest.csv") as file:
        file.write(b"x")
    assert (tmp_path / "latest.csv").is_symlink()
    assert (tmp_path / "folder" / "out.csv").read_text() == "x"


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt", "w", errors="surrogateescape", newline="") as file:
        file.write("고양이\r\n\udcff")
    assert (tmp_path / "a.txt").read_bytes() == "고양이\r\n".encode() + b"\xff"


def test_what_cannot_be_written_is_named_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "a.txt", tmp_path / "folder"):
        with pytest.raises(OSError, match=str(path)), atomic_write(path):
            pass
    assert os.listdir(tmp_path) == ["folder"]


def test_a_path_may_stay_empty_only_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        pass
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    check_folder_writable(tmp_path / "made", "--flag")
    assert not list((tmp_path / "made").iterdir())
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", Path("/proc")):
        with pytest.raises(ValueError, match=f"--flag.*{path}"):
            check_folder_writable(path, "--flag")


def test_a_user_without_a_home_needs_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder("--flag") == Path("/somewhere/purebred")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(ValueError, match=r"--flag.* XDG_CACHE_HOME"):
        cache_folder("--flag")


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    name = "é" * 125 + ".jpg"
    with atomic_write(tmp_path / name) as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == [name]


def test_a_home_folder_is_expanded_where_a_value_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = [
        "--images=~/photos",
        "~/a b",
        "~",
        "--output",
        "s3://bucket/~/x",
        "a~/b",
        "--x=~nobody-1/x",
        "",
    ]
    expected = ["--images=/home/me/photos", "/home/me/a b", "/home/me", *given[3:]]
    assert expand_arguments(given) == expected

"""A user without a home folder: docker run --user 12345."""

import getpass
import os
import stat
import tempfile
from pathlib import Path

import pytest

from train.home import ensure_home

VARIABLES = ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "LOGNAME", "USER", "LNAME", "USERNAME")


@pytest.fixture(autouse=True)
def _unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    for name in VARIABLES:
        monkeypatch.setenv(name, "x")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize("home", [None, "/proc", "/nonexistent/user"])
def test_libraries_get_a_folder_of_their_own_and_a_name(
    home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).is_relative_to(tmp_path))
    own = tmp_path / f"purebred-{os.getuid()}"
    assert str(own) in ensure_home()
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert os.environ["XDG_CACHE_HOME"] == str(own)
    assert Path.home() == (Path(home) if home else own), "a home with credentials stays"
    assert getpass.getuser()
    assert ensure_home() == "", "once"


def test_a_home_that_can_be_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "new"))
    assert ensure_home() == ""
    assert "XDG_CACHE_HOME" not in os.environ


def test_a_name_that_somebody_else_took_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"purebred-{os.getuid()}").symlink_to(tmp_path / "gone")
    ensure_home()
    own = Path(os.environ["XDG_CACHE_HOME"])
    assert own.is_dir()
    assert own != tmp_path / f"purebred-{os.getuid()}"

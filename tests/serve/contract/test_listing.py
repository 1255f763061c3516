"""Which files below a folder are images, and which folders are not entered."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from serve.contract.images import read_image_file
from serve.contract.listing import list_images


def make_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))


def test_images_are_found_in_every_folder_sorted_whatever_the_case(tmp_path: Path) -> None:
    images = ["10.jpg", "2.JPG", "Z.Png", "a/b/c/deep.webp", "a/x.jpeg", "a-b.tiff", "d.jpg/inside.gif"]
    others = ["notes.txt", "jpg", ".jpg", "a/model.onnx", "x.jpg.part"]
    make_files(tmp_path, *images, *others)
    (tmp_path / "empty").mkdir()
    listing = list_images(tmp_path)
    assert listing.paths == sorted(images)
    assert listing.ignored == {".txt": 1, ".onnx": 1, ".part": 1, "without a suffix": 1, "": 1}
    assert listing.problems == {}
    assert list_images(tmp_path, recursive=False).paths == ["10.jpg", "2.JPG", "Z.Png", "a-b.tiff"]


ODD_NAMES = ["a b .jpg", "고양이.jpg", "two\nlines.jpg", "tab\t.jpg", 'quote"d.jpg', "=cmd.jpg", "._x.jpg"]
ODD_NAMES += ["e\u0301.jpg", "\u00e9.jpg", "-rf.jpg", "x" * 251 + ".jpg", os.fsdecode(b"caf\xe9.jpg")]


def test_any_file_name_is_found_and_can_be_opened(tmp_path: Path) -> None:
    make_files(tmp_path, *ODD_NAMES, *(f"{name} folder/{name}" for name in ODD_NAMES[:-2]))
    listing = list_images(tmp_path)
    assert len(listing.paths) == 2 * len(ODD_NAMES) - 2
    assert listing.paths == sorted(listing.paths)
    assert set(ODD_NAMES) < set(listing.paths)
    assert {p: read_image_file(tmp_path / p) for p in listing.paths} == {
        p: os.fsencode(p) for p in listing.paths
    }


def test_linked_folders_are_reported_not_followed_and_linked_files_are_kept(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    make_files(outside, "secret.jpg")
    make_files(root, "real.jpg", "sub/real.jpg")
    for name, target in {
        "loop": ".",
        "sub/up": "..",
        "out": "../outside",
        "named.jpg": "sub",
        "file.jpg": "../outside/secret.jpg",
        "self.jpg": "self.jpg",
        "dangling.jpg": "nowhere.jpg",
    }.items():
        (root / name).symlink_to(target)
    listing = list_images(root)
    assert listing.problems == dict.fromkeys(
        ("loop", "sub/up", "out", "named.jpg"), "linked folder, not followed"
    )
    assert listing.paths == ["dangling.jpg", "file.jpg", "real.jpg", "self.jpg", "sub/real.jpg"]


def test_system_folders_are_counted_and_not_entered(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg", "@eaDir/a.jpg/t.jpg", "b/@EADIR/x.jpg", "LOST+FOUND/x.jpg", "Thumbs.db")
    (tmp_path / "b" / ".snapshot").symlink_to(tmp_path)
    listing = list_images(tmp_path)
    assert listing.paths == ["a.jpg"]
    assert listing.system == {"@eaDir": 1, "@EADIR": 1, "LOST+FOUND": 1, ".snapshot": 1}
    assert listing.ignored == {"": 1}
    assert listing.problems == {}


def test_a_folder_that_cannot_be_listed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may run as root, whom no folder refuses: the system call is made to."""
    make_files(tmp_path, "a.jpg", "locked/hidden.jpg", "z/b.jpg")
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path) == tmp_path / "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_images(tmp_path)
    assert listing.paths == ["a.jpg", "z/b.jpg"]
    assert listing.problems == {"locked/": "cannot list this folder: Permission denied"}
    with pytest.raises(PermissionError):
        list_images(tmp_path / "locked")


def test_a_folder_that_cannot_be_listed_now_is_no_shorter_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, "a.jpg", "share/b.jpg")
    scandir = os.scandir

    def fail(path: Path) -> Any:
        if Path(path) == tmp_path / "share":
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(OSError, match="share"):
        list_images(tmp_path)


def test_a_root_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg")
    with pytest.raises(FileNotFoundError):
        list_images(tmp_path / "missing")
    with pytest.raises(NotADirectoryError):
        list_images(tmp_path / "a.jpg")

"""A member of a tar file is read as a file of its path is, and nothing else is taken for it."""

import os
import tarfile
import threading
from pathlib import Path

import pytest
from tar_files import make_tar

from serve.contract.archive import list_members, read_member, split_member
from serve.contract.errors import UserError
from serve.contract.images import MAX_FILE_BYTES, read_image_file


def test_members_are_read_by_their_path_whatever_the_name(tmp_path: Path) -> None:
    contents = {f"{name}.jpg": name.encode() * 999 for name in ("a", "./b", "c/d", "e//f", "ü \n", "../up")}
    tar = make_tar(tmp_path / "x.tar", contents)
    for name, data in contents.items():
        assert read_image_file(tmp_path / "x.tar" / name) == data, name
        assert read_image_file(f"{tar}/{name}") == data, name
    assert list_members(tar)[0] == ["a.jpg", "b.jpg", "c/d.jpg", "e/f.jpg", "ü \n.jpg", "../up.jpg"]


def test_a_folder_or_a_member_that_is_called_tar_is_no_tar_file(tmp_path: Path) -> None:
    (tmp_path / "set.tar").mkdir()
    (tmp_path / "set.tar" / "1.jpg").write_bytes(b"file")
    assert split_member(tmp_path / "set.tar" / "1.jpg") is None
    assert read_image_file(tmp_path / "set.tar" / "1.jpg") == b"file"
    inner = make_tar(tmp_path / "set.tar" / "x.tar", {"y.tar/1.jpg": b"member"})
    assert split_member(inner / "y.tar" / "1.jpg") == (str(inner), "y.tar/1.jpg")
    assert read_image_file(inner / "y.tar" / "1.jpg") == b"member"


def test_a_tar_files_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "SET.TAR", {"1.jpg": b"member"})
    assert read_image_file(tar / "1.jpg") == b"member"


def test_what_is_no_member_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file.jpg").write_bytes(b"x")
    tar = make_tar(tmp_path / "x.tar", {"a.jpg": b"a", "empty.jpg": b""})
    with tarfile.open(tar, "a") as file:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    for name in ("b.jpg", "link.jpg", "../file.jpg", "../../etc/passwd"):
        with pytest.raises(FileNotFoundError, match=r"x\.tar"):
            read_image_file(f"{tar}/{name}")
    with pytest.raises(UserError, match="0 bytes"):
        read_image_file(tar / "empty.jpg")
    with pytest.raises(NotADirectoryError):
        read_image_file(tmp_path / "file.jpg" / "a.jpg")


def test_a_member_above_the_limit_is_not_read_into_memory(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    with tar.open("wb") as file:
        info = tarfile.TarInfo("big.jpg")
        info.size = MAX_FILE_BYTES + 1
        file.write(info.tobuf())
        file.truncate(512 + -(-info.size // 512) * 512 + 1024)  # a hole
    with pytest.raises(UserError, match=str(MAX_FILE_BYTES)):
        read_image_file(tar / "big.jpg")
    assert len(read_member(str(tar), "big.jpg", 10)) == 11


def test_a_damaged_tar_file_is_named(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar", {f"{i}.jpg": bytes(3000) for i in range(3)})
    whole = tar.read_bytes()
    for damaged in (whole[:2000], whole[:3584] + b"?" * 512 + whole[4096:], b"", b"no tar file" * 100):
        tar.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.tar"):
            list_members(tar)
        with pytest.raises(UserError, match=r"x\.tar"):
            read_image_file(tar / "0.jpg")


def test_members_behind_an_end_mark_are_not_lost_without_a_word(tmp_path: Path) -> None:
    one, two = (make_tar(tmp_path / f"{i}.tar", {f"{i}.jpg": bytes(3000)}) for i in range(2))
    joined, lone = tmp_path / "joined.tar", tmp_path / "lone.tar"
    joined.write_bytes(one.read_bytes() + two.read_bytes())
    lone.write_bytes(one.read_bytes()[:3584] + bytes(512) + two.read_bytes())
    for tar in (joined, lone):
        with pytest.raises(UserError, match=r"end mark at byte 3584.* tar -i"):
            list_members(tar)


def test_a_tar_file_that_is_replaced_is_listed_anew(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar", {"a.jpg": b"first"})
    assert read_image_file(tar / "a.jpg") == b"first"
    make_tar(tmp_path / "y.tar", {"b.jpg": b"xx" * 999, "a.jpg": b"second"}).replace(tar)
    assert read_image_file(tar / "a.jpg") == b"second"


def test_threads_read_at_the_same_time(tmp_path: Path) -> None:
    contents = {f"{i}.jpg": f"{i}".encode() * 1000 for i in range(200)}
    tar = make_tar(tmp_path / "x.tar", contents)
    wrong: list[str] = []

    def read_all() -> None:
        wrong.extend(name for name, data in contents.items() if read_image_file(tar / name) != data)

    threads = [threading.Thread(target=read_all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_later_link_of_the_same_name_is_what_counts(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", {"a.png": b"old", "b.png": b"b"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "b.png"
        tar.addfile(link)
    assert list_members(path) == (["b.png"], ["a.png"])
    with pytest.raises(FileNotFoundError):
        read_member(str(path), "a.png", 10)


def test_a_tar_file_that_was_replaced_by_one_of_its_size_and_time_is_indexed_anew(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar", {"a.jpg": b"a" * 9, "b.jpg": b"b" * 9})
    assert read_member(str(tar), "a.jpg", 99) == b"a" * 9
    before = tar.stat()
    make_tar(tar, {"b.jpg": b"b" * 9, "a.jpg": b"a" * 9})
    while True:  # as cp -p does; until the clock has gone on
        os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
        if tar.stat().st_ctime_ns != before.st_ctime_ns:
            break
    assert (tar.stat().st_size, tar.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert read_member(str(tar), "a.jpg", 99) == b"a" * 9

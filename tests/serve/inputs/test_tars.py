"""Members of tar files are read in place, and damage is reported, never skipped."""

import errno
import io
import os
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from serve_model import encode, noise, open_descriptors_unchanged, solid

from serve.contract.archive import MAX_HEADER_BYTES, plain
from serve.contract.errors import UserError
from serve.contract.images import MAX_FILE_BYTES
from serve.inputs.base import LeftOut
from serve.inputs.inventory import Entry, Inventory
from serve.inputs.tars import Tars
from serve.storage import OutageError

JPEG = encode(noise(20, 20), "JPEG")


def member(
    name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **attributes: object
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info


def make_tar(path: Path, members: dict[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members.items():
            tar.addfile(member(name, len(data)), io.BytesIO(data))
    return path


def listed(tars: Tars, path: Path) -> tuple[dict[str, Entry], int]:
    """(entries by name, how many members have no image suffix)"""
    entries = {entry.name: entry for entry in tars.index(str(path), path.name)}
    return entries, tars.left_out.others.total()


NAMES = [
    "a.jpg",
    "./b.JPG",
    "deep/er/c.png",
    "x" * 200 + ".jpg",
    "고양이\n.jpg",
    "../../etc/passwd.jpg",
    "/abs.jpg",
]
NAMES.append(os.fsdecode(b"caf\xe9.jpg"))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_image_of_a_tar_file_is_read_in_place(tmp_path: Path, tar_format: int) -> None:
    names = NAMES if tar_format != tarfile.USTAR_FORMAT else [n for n in NAMES if len(n) < 100]
    contents = {name: name.encode("utf-8", "surrogateescape") * 50 for name in names}
    others = {"000.cls": b"1", "000.json": b"{}", "README": b""}
    path = make_tar(tmp_path / "x.tar", contents | others, tar_format)
    tars = Tars(LeftOut())
    with open_descriptors_unchanged():
        entries, ignored = listed(tars, path)
        assert set(entries) == {f"x.tar/{plain(name)}" for name in names}
        assert ignored == len(others)
        for name, data in contents.items():
            assert tars.read(entries[f"x.tar/{plain(name)}"]) == data
    assert os.listdir(tmp_path) == ["x.tar"]


def test_members_of_one_name_in_several_tar_files_are_distinct(tmp_path: Path) -> None:
    tars = Tars(LeftOut())
    for number in range(3):
        make_tar(tmp_path / f"{number}.tar", {"same.jpg": str(number).encode()})
    entries = [listed(tars, tmp_path / f"{n}.tar")[0][f"{n}.tar/same.jpg"] for n in range(3)]
    assert [tars.read(entry) for entry in entries] == [b"0", b"1", b"2"]


def test_what_is_no_regular_file_is_a_problem_of_its_own(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(member("d.jpg", kind=tarfile.DIRTYPE))
        tar.addfile(member("link.jpg", kind=tarfile.SYMTYPE, linkname="/etc/passwd"))
        tar.addfile(member("hard.jpg", kind=tarfile.LNKTYPE, linkname="good.jpg"))
        tar.addfile(member("fifo.jpg", kind=tarfile.FIFOTYPE))
        tar.addfile(member("null.jpg", kind=tarfile.CHRTYPE, devmajor=1, devminor=3))
        tar.addfile(member("empty.jpg"))
        tar.addfile(member("good.jpg", len(JPEG)), io.BytesIO(JPEG))
        tar.addfile(member("also.gif", len(JPEG)), io.BytesIO(JPEG))
    entries, _ = listed(Tars(LeftOut()), tmp_path / "x.tar")
    problems = {name.removeprefix("x.tar/"): entry.problem for name, entry in entries.items()}
    assert problems == {
        "link.jpg": "not a regular file but a symbolic link in a tar file",
        "hard.jpg": "not a regular file but a hard link in a tar file",
        "fifo.jpg": "not a regular file but a FIFO in a tar file",
        "null.jpg": "not a regular file but a device in a tar file",
        "empty.jpg": "empty file (0 bytes)",
        "good.jpg": "",
        "also.gif": "",
    }


def flip_second_header(data: bytes) -> bytes:
    """Of three members of 512 bytes each: header, data, header, data, ..."""
    return data[:1024] + b"X" + data[1025:]


def claims(size: int, kind: bytes) -> bytes:
    return member("a.jpg", size, kind).tobuf(tarfile.GNU_FORMAT)


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], int, str]] = {
    # what is done to three images; how many of them are still there; the problem, as docs/hostile.md has it
    "nothing": (lambda data: data, 3, ""),
    "cut inside the last image": (lambda data: data[: 2 * 1024 + 512 + 100], 3, "unexpected end of data"),
    "cut behind the second image": (lambda data: data[: 2 * 1024], 2, "no end mark at byte 2048"),
    "cut inside the third header": (lambda data: data[: 2 * 1024 + 99], 2, "no end mark at byte 2048"),
    "a damaged header": (flip_second_header, 1, "no end mark at byte 1024"),
    "a member that claims a terabyte": (
        lambda data: data[:1024] + claims(1 << 40, tarfile.REGTYPE) + data[1024:],
        1,
        "over the limit",
    ),
    "a name of a gigabyte": (
        lambda data: data[:1024] + claims(1 << 30, tarfile.GNUTYPE_LONGNAME) + data[1024:],
        1,
        f"a header of {1 << 30} bytes is over the limit of {MAX_HEADER_BYTES}",
    ),
    "attributes of a gigabyte": (
        lambda data: data[:1024] + claims(1 << 30, tarfile.XHDTYPE) + data[1024:],
        1,
        "is over the limit",
    ),
    "a chain of headers": (
        lambda data: data[:1024] + claims(0, tarfile.XHDTYPE) * 5000 + data[1024:],
        1,
        "cannot read this tar file to its end",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_costs_no_image_before_it_and_is_reported(tmp_path: Path, damage: str) -> None:
    act, images, reason = DAMAGE[damage]
    contents = {f"{i}.jpg": bytes([i + 1]) * 512 for i in range(3)}
    path = make_tar(tmp_path / "x.tar", contents, tarfile.USTAR_FORMAT)
    path.write_bytes(act(path.read_bytes()))
    tars = Tars(LeftOut())
    entries, _ = listed(tars, path)
    problems = [entry.problem for entry in entries.values() if entry.problem]
    if reason:
        assert any(reason in problem for problem in problems), problems
    else:
        assert problems == []
    good = [entry for entry in entries.values() if not entry.problem]
    assert len(good) == images
    for entry in good:
        name = entry.name.removeprefix("x.tar/")
        if damage == "cut inside the last image" and name == "2.jpg":
            with pytest.raises(UserError, match=r"100 .*512"):
                tars.read(entry)
        else:
            assert tars.read(entry) == contents[name]


def test_a_tar_file_that_cannot_be_read_now_is_no_shorter_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is started again must number the same rows."""
    path = make_tar(tmp_path / "x.tar", {"0.jpg": JPEG, "1.jpg": JPEG})
    read, calls = tarfile.TarInfo.fromtarfile.__func__, []  # type: ignore[attr-defined]

    def fail(kind: type[tarfile.TarInfo], tar: tarfile.TarFile) -> tarfile.TarInfo:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.EIO, "Input/output error")
        return read(kind, tar)  # type: ignore[no-any-return]

    monkeypatch.setattr(tarfile.TarInfo, "fromtarfile", classmethod(fail))
    with pytest.raises(OutageError, match=r"x\.tar .*Input/output error"):
        listed(Tars(LeftOut()), path)


def test_a_header_that_leads_backwards_is_no_endless_loop(tmp_path: Path) -> None:
    """A size can be negative in base 256."""
    header = bytearray(claims(0, tarfile.REGTYPE))
    header[124:136] = b"\xff" * 10 + (-1024).to_bytes(2, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = make_tar(tmp_path / "x.tar", {"0.jpg": b"x" * 512}, tarfile.USTAR_FORMAT)
    path.write_bytes(path.read_bytes()[:1024] + bytes(header) + path.read_bytes()[1024:])
    entries, _ = listed(Tars(LeftOut()), path)
    assert any("leads backwards" in entry.problem for entry in entries.values())


@pytest.mark.parametrize("contents", [b"", b"not a tar" * 100, encode(solid((1, 2, 3)), "PNG")])
def test_what_is_no_tar_file_is_a_problem_under_its_name(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(contents)
    entries, _ = listed(Tars(LeftOut()), tmp_path / "x.tar")
    assert list(entries) == ["x.tar"]
    assert entries["x.tar"].problem


def test_a_fifo_named_tar_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    assert "not a regular file" in listed(Tars(LeftOut()), tmp_path / "x.tar")[0]["x.tar"].problem
    assert "No such file" in listed(Tars(LeftOut()), tmp_path / "y.tar")[0]["y.tar"].problem


def test_a_tar_file_that_changed_since_it_was_listed_gives_errors_not_other_images(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", {"a.jpg": b"1" * 512, "b.jpg": b"2" * 512})
    tars = Tars(LeftOut())
    entries, _ = listed(tars, path)
    make_tar(path, {"c.jpg": b"3" * 512, "b.jpg": b"2" * 512})
    with pytest.raises(UserError, match="changed"):
        tars.read(entries["x.tar/b.jpg"])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        tars.read(entries["x.tar/b.jpg"])


@pytest.mark.parametrize(
    "last",
    [member("./a.png"), member("a.png", kind=tarfile.LNKTYPE, linkname="b.png")],
    ids=["an empty file", "a hard link"],
)
def test_of_members_of_one_name_the_last_counts_also_when_it_is_none(
    tmp_path: Path, last: tarfile.TarInfo
) -> None:
    path = make_tar(tmp_path / "x.tar", {"a.png": b"old", "b.png": b"b"})
    with tarfile.open(path, "a") as tar:
        tar.addfile(last)
    inventory = Inventory.sort(Tars(LeftOut()).index(str(path), "x.tar"))
    a, b = inventory.entries()
    assert (a.name, b.name, b.problem) == ("x.tar/a.png", "x.tar/b.png", "")
    assert a.problem
    assert inventory.repeated == 1


def test_of_members_of_one_name_the_last_counts_however_far_behind(tmp_path: Path) -> None:
    """Places are sorted as text: that of the last must not have to be longer."""
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (
            ("first.txt", b""),
            ("a.png", b"old"),
            ("b.txt", bytes(9_000)),
            ("a.png", b"new"),
        ):
            tar.addfile(member(name, len(data)), io.BytesIO(data))
    tars = Tars(LeftOut())
    inventory = Inventory.sort(tars.index(str(tmp_path / "x.tar"), "x.tar"))
    assert [tars.read(entry) for entry in inventory.entries()] == [b"new"]


def test_members_with_large_attributes_are_read(tmp_path: Path) -> None:
    """macOS keeps small files in them."""
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in "abc":
            headers = {"LIBARCHIVE.xattr.fork": "x" * 60_000} if name == "b" else {}
            tar.addfile(member(f"{name}.png", 1, pax_headers=headers), io.BytesIO(name.encode()))
    tars = Tars(LeftOut())
    entries, _ = listed(tars, tmp_path / "x.tar")
    assert [tars.read(entry) for entry in entries.values()] == [b"a", b"b", b"c"]


def test_sparse_and_huge_members_are_problems(tmp_path: Path) -> None:
    data = claims(MAX_FILE_BYTES + 1, tarfile.REGTYPE)
    (tmp_path / "x.tar").write_bytes(data)
    with (tmp_path / "x.tar").open("ab") as file:
        file.truncate(512 + MAX_FILE_BYTES + 512 + 1024)  # a hole
    entries, _ = listed(Tars(LeftOut()), tmp_path / "x.tar")
    assert str(MAX_FILE_BYTES + 1) in entries["x.tar/a.jpg"].problem
    with (tmp_path / "hole.jpg").open("wb") as file:
        file.truncate(1 << 20)
    subprocess.run(["tar", "--sparse", "-cf", "sparse.tar", "hole.jpg"], cwd=tmp_path, check=True)
    entries, _ = listed(Tars(LeftOut()), tmp_path / "sparse.tar")
    assert "sparse" in entries["sparse.tar/hole.jpg"].problem


def test_a_tar_file_of_many_members_is_listed_in_little_memory(tmp_path: Path) -> None:
    block = member("0.jpg", 1).tobuf() + b"x" * 512
    with (tmp_path / "x.tar").open("wb") as file:
        for _ in range(20_000):
            file.write(block)
        file.write(b"\0" * 1024)
    tracemalloc.start()
    try:
        assert sum(1 for _ in Tars(LeftOut()).index(str(tmp_path / "x.tar"), "x.tar")) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()

"""A data set in an object store is trained on as a folder is; what is copied once is not copied again."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import SMALL
from s3 import s3_server
from tar_files import make_tar
from train_data import flat_set

import train.data.download
from serve import storage
from train.config import TrainConfig
from train.data.download import INDEX, copy, fetch
from train.distributed import Ranks


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with s3_server() as client:
        yield client


def put(client: Any, key: str, data: bytes) -> None:
    client.put_object(Bucket="bucket", Key=key, Body=data)


def copied(url: str, cache: Path, refresh: bool = True) -> tuple[dict[str, bytes], str]:
    """(the files, what was said)"""
    said: list[str] = []
    home = copy(url, cache, refresh, said.append)
    files = [path for path in home.rglob("*") if path.is_file() and path.name != INDEX]
    return {path.relative_to(home).as_posix(): path.read_bytes() for path in files}, " ".join(said)


def test_without_file_locks_data_is_copied_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    root = flat_set(tmp_path / "images", 1)
    monkeypatch.setattr("fcntl.lockf", refuse)
    files, said = copied(f"file://{root}", tmp_path / "cache")
    assert set(files) == {"cat.0.png", "dog.0.png"}
    assert "No locks available" in said


@pytest.mark.parametrize("local_rank", [0, 1])
def test_the_first_rank_of_a_machine_copies_before_the_others(
    local_rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no file lock holds them back."""
    order: list[str] = []
    monkeypatch.setattr(train.data.download, "copy", lambda *_: order.append("copied") or tmp_path)
    monkeypatch.setattr(
        train.data.download, "gather_list", lambda values, ranks: order.append("met") or [values]
    )
    fetch(TrainConfig(data="s3://bucket/x"), Ranks(local_rank, local_rank, 2, 2), print)
    assert order == (["copied", "met", "met"] if local_rank == 0 else ["met", "copied", "met"])


def test_what_is_there_is_not_copied_again_and_what_changed_is(client: Any, tmp_path: Path) -> None:
    url = "s3://bucket/changing"
    for name in ("cat/1.jpg", "dog/deep/1.jpg", "cat/2 %.jpg"):
        put(client, f"changing/{name}", name.encode())
    put(client, "changing-not/3.jpg", b"another prefix")
    expected = {name: name.encode() for name in ("cat/1.jpg", "dog/deep/1.jpg", "cat/2 %.jpg")}
    files, said = copied(url, tmp_path)
    assert files == expected
    assert "3 of 3 files" in said
    assert copied(url, tmp_path) == (expected, "")

    put(client, "changing/cat/1.jpg", b"CAT/1.jpg")  # as many bytes
    client.delete_object(Bucket="bucket", Key="changing/dog/deep/1.jpg")
    assert copied(url, tmp_path, refresh=False) == (expected, "")
    files, said = copied(url, tmp_path)
    assert files == {"cat/1.jpg": b"CAT/1.jpg", "cat/2 %.jpg": b"cat/2 %.jpg"}
    assert "1 of 2 files" in said


def test_a_copy_that_was_stopped_is_continued(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(9):
        put(client, f"stopped/{i}.jpg", bytes([i]))
    real = storage.get_file

    def fails_at_seven(url: str, path: Path, size: int | None) -> None:
        if path.name == "7.jpg":
            raise OSError("the network is gone")
        real(url, path, size)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "get_file", fails_at_seven)
        with pytest.raises(ValueError, match=r"s3://bucket/stopped.*the network is gone"):
            copied("s3://bucket/stopped", tmp_path)
    put(client, "stopped/3.jpg", b"!")  # as many bytes
    files, said = copied("s3://bucket/stopped", tmp_path, refresh=False)
    assert files == {f"{i}.jpg": bytes([i]) for i in range(9)} | {"3.jpg": b"!"}
    assert "2 of 9 files" in said


def test_a_store_that_is_away_does_not_stop_a_job_that_has_its_copy(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(client, "away/1.jpg", b"x")
    assert copied("s3://bucket/away", tmp_path)[0] == {"1.jpg": b"x"}

    def refused(url: str) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr(storage, "list_files", refused)
    files, said = copied("s3://bucket/away", tmp_path)
    assert files == {"1.jpg": b"x"}
    assert "s3://bucket/away" in said
    assert "refused" in said


class Unversioned:
    """A server that tells of a file how long it is and no more."""

    def __init__(self, **info: object):
        self.data, self.version = b"old", info

    def info(self, url: str) -> dict[str, Any]:
        return {"size": len(self.data), **self.version}

    def get_file(self, url: str, target: str) -> None:
        Path(target).write_bytes(self.data)


@pytest.mark.parametrize(("before", "after"), [({}, {}), ({"Last-Modified": "1"}, {"Last-Modified": "2"})])
def test_a_signed_tar_file_is_copied_once_and_anew_when_it_may_be_another(
    before: dict[str, str], after: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Unversioned(**before)
    monkeypatch.setattr(storage, "filesystem", lambda url: files)
    said: list[str] = []

    def get(number: int, refresh: bool) -> bytes:
        url = f"https://host/set.tar?X-Amz-Date={number}&X-Amz-Signature=SECRET"
        return copy(url, tmp_path, refresh, said.append).read_bytes()

    assert get(1, True) == b"old"
    files.data = b"new"
    assert get(2, False) == b"old"  # another process of the same start
    files.version = after
    assert get(3, True) == b"new"
    assert [path.name for path in tmp_path.rglob("*.tar")] == ["set.tar"]
    assert not any("SECRET" in text for text in said)


def test_what_a_store_says_nothing_about_is_copied_again(tmp_path: Path) -> None:
    import fsspec

    url, files = "memory://unmarked", fsspec.filesystem("memory")
    files.pipe({"unmarked/cat/1.jpg": b"old", "unmarked/cat/2.jpg": b"two"})
    assert copied(url, tmp_path)[0]["cat/1.jpg"] == b"old"
    files.pipe("unmarked/cat/1.jpg", b"new")
    assert copied(url, tmp_path)[0]["cat/1.jpg"] == b"new"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://bucket/nothing", "s3://bucket/nothing holds no files"),
        ("s3://no-such-bucket/a", "s3://no-such-bucket/a"),
        ("https://localhost:1/images/", "https://localhost:1/images/: HTTP"),
        ("nope://a/b", "nope://a/b: "),
        ("s3://bucket/escape", r"s3://bucket/escape/\.\./x\.jpg"),
    ],
)
def test_what_cannot_be_copied_is_named(client: Any, tmp_path: Path, url: str, reason: str) -> None:
    put(client, "escape/../x.jpg", b"x")
    with pytest.raises(ValueError, match=reason):
        copied(url, tmp_path)


def test_no_room_is_an_error_before_anything_is_copied(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(client, "room/1.jpg", b"x" * 1000)
    monkeypatch.setattr(
        train.data.download.shutil, "disk_usage", lambda _: type("usage", (), {"free": 999})
    )
    with pytest.raises(ValueError, match=r"0\.00 GB free.* --output"):
        copied("s3://bucket/room", tmp_path)
    assert not list(tmp_path.rglob("*.jpg"))


def test_two_processes_train_on_shards_of_a_bucket(client: Any, tmp_path: Path) -> None:
    images = sorted(flat_set(tmp_path / "images", per_class=16).iterdir())
    for shard in range(2):
        part = {path.name: path.read_bytes() for path in images[shard::2]}
        put(client, f"set/{shard}.tar", make_tar(tmp_path / f"{shard}.tar", part).read_bytes())
    settings = ["--data", "s3://bucket/set", *SMALL, "--batch-size", 8, "--epochs", 1, "--track", "false"]
    printed = forked.train(2, *settings, "--name", "a", cwd=tmp_path)
    assert "copying s3://bucket/set: 2 of 2 files" in printed
    assert "32 images" in printed
    missing = ["--data", "s3://bucket/typo", *settings[2:], "--name", "b"]
    printed = forked.train(2, *missing, cwd=tmp_path, code=2)
    assert "error: --data s3://bucket/typo holds no files" in printed


def test_a_file_that_a_crash_has_cut_is_copied_again(client: Any, tmp_path: Path) -> None:
    put(client, "cut/1.jpg", b"whole")
    home = copy("s3://bucket/cut", tmp_path, True, print)
    (home / "1.jpg").write_bytes(b"")
    assert copied("s3://bucket/cut", tmp_path)[0] == {"1.jpg": b"whole"}

"""Snapshots: the newest two are kept, a damaged one is named and passed over, a full disk stops nothing."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from train.runs import snapshots
from train.runs.snapshots import Snapshots, copy_to_cpu, list_snapshots, newest_whole


def state(epoch: int, step: int = 0, value: float = 0.0) -> dict[str, Any]:
    return {"epoch": epoch, "position": {"step": step}, "model": {"w": torch.full((3,), value)}}


def write(writer: Snapshots, *arguments: Any) -> bool:
    """Write, wait for it, and return whether that succeeded."""
    writer.write(*arguments)
    return writer.finish()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_two_are_kept_and_last_is_the_end_of_an_epoch(tmp_path: Path) -> None:
    writer = Snapshots(tmp_path, 0, print)
    for epoch, step in ((1, 0), (1, 7), (2, 0), (2, 10), (2, 200)):
        assert write(writer, state(epoch, step))
    assert names(tmp_path) == [
        "epoch-000002-step-00000010.pt",
        "epoch-000002-step-00000200.pt",
        "last.pt",
    ]
    assert load_checkpoint(tmp_path / "last.pt")["position"]["step"] == 0
    newest = newest_whole(tmp_path, print)
    assert newest is not None
    assert load_checkpoint(newest)["position"]["step"] == 200


def test_what_is_written_in_the_background_is_what_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    released = threading.Event()

    def waits(*arguments: Any) -> None:
        assert released.wait(60), "training waited for the disk"
        save_checkpoint(*arguments)

    monkeypatch.setattr(snapshots, "save_checkpoint", waits)
    writer, current = Snapshots(tmp_path, 1e-9, print), state(0, 5, value=1.0)
    assert writer.begin(current)
    current["model"]["w"].fill_(9)
    assert not writer.due(), "one at a time"
    assert not writer.begin(current)
    released.set()
    writer.finish()
    assert writer.due()
    (path,) = list_snapshots(tmp_path)
    assert load_checkpoint(path)["model"]["w"].tolist() == [1, 1, 1]


def test_the_end_of_an_epoch_is_written_while_the_next_one_trains(tmp_path: Path) -> None:
    writer, released, order = Snapshots(tmp_path, 0, print), threading.Event(), []

    def best() -> None:
        assert released.wait(60), "training waited for the disk"
        order.append("best")

    writer.write(state(1), best, lambda: order.append(*[path.name for path in list_snapshots(tmp_path)]))
    assert not writer.begin(state(1, 3)), "one at a time"
    released.set()
    assert writer.finish()
    assert order == ["best", "epoch-000001-step-00000000.pt"]


def test_a_bug_in_the_background_ends_the_run(tmp_path: Path) -> None:
    writer, tried = Snapshots(tmp_path, 0, print), []

    def bug() -> None:
        raise ZeroDivisionError

    writer.write(state(1), bug, lambda: tried.append(True))
    with pytest.raises(ZeroDivisionError):
        writer.write(state(2))
    assert tried
    assert list_snapshots(tmp_path) == []


def test_no_snapshots_in_an_epoch_are_due_when_minutes_is_0(tmp_path: Path) -> None:
    assert not Snapshots(tmp_path, 0, print).due()


def test_the_end_of_an_epoch_is_written_after_what_is_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the older one would come last, and be last.pt."""
    waited_for = threading.Event()

    def slow(state: dict[str, Any], path: Path) -> None:
        if state["epoch"] == 1:
            waited_for.wait(5)
        save_checkpoint(state, path)

    monkeypatch.setattr(snapshots, "save_checkpoint", slow)
    writer = Snapshots(tmp_path, 1, print)
    finish = writer.finish
    monkeypatch.setattr(writer, "finish", lambda: (waited_for.set(), finish()))
    assert writer.begin(state(1))
    assert write(writer, state(2))
    writer.finish()
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 2


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".last.pt.0123.tmp").write_bytes(b"half")
    assert write(Snapshots(tmp_path, 0, print), state(1))
    assert names(tmp_path) == ["epoch-000001-step-00000000.pt", "last.pt"]
    assert (tmp_path / "last.pt").samefile(tmp_path / "epoch-000001-step-00000000.pt"), "no copy"


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_damaged_newest_one_is_named_set_aside_and_the_one_before_is_used(
    tmp_path: Path, kept: int
) -> None:
    writer, printed = Snapshots(tmp_path, 0, print), []
    write(writer, state(1))
    write(writer, state(1, 3))
    newest = list_snapshots(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[:kept])
    assert newest_whole(tmp_path, printed.append) == tmp_path / "epoch-000001-step-00000000.pt"
    assert newest.name in printed[0]
    assert (tmp_path / f"{newest.name}.damaged").exists()
    assert newest not in list_snapshots(tmp_path)


def test_a_disk_that_fails_to_read_costs_no_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are whole when it is there again."""
    writer = Snapshots(tmp_path, 0, print)
    write(writer, state(1))
    write(writer, state(2))
    before = names(tmp_path)

    def fails(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        with pytest.raises(CheckpointError, match=r"000002-.*Input/output error"):
            newest_whole(tmp_path, print)
    assert names(tmp_path) == before
    assert newest_whole(tmp_path, print) == tmp_path / "epoch-000002-step-00000000.pt"


def test_when_all_are_damaged_that_is_an_error(tmp_path: Path) -> None:
    write(Snapshots(tmp_path, 0, print), state(1))
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"epoch-000001-step.*last\.pt.*--name"):
        newest_whole(tmp_path, lambda _: None)
    assert newest_whole(tmp_path / "none", print) is None


def test_a_checkpoint_of_a_version_without_snapshots_is_continued(tmp_path: Path) -> None:
    save_checkpoint({"epoch": 3}, tmp_path / "last.pt")
    assert newest_whole(tmp_path, print) == tmp_path / "last.pt"


def test_a_full_disk_is_warned_of_and_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[str] = []
    writer = Snapshots(tmp_path, 0, printed.append)
    write(writer, state(1))

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert not write(writer, state(2))
        writer.begin(state(2, 4))
        writer.finish()
    assert len(printed) == 2
    assert "No space left on device" in printed[0]
    assert newest_whole(tmp_path, print) == tmp_path / "epoch-000001-step-00000000.pt"
    assert names(tmp_path) == ["epoch-000001-step-00000000.pt", "last.pt"]
    assert write(writer, state(3)), "there is room again"


def test_what_a_snapshot_refers_to_is_written_before_it_however_late(tmp_path: Path) -> None:
    """A best checkpoint that did not fit: no snapshot may say that it is there."""
    writer, attempts = Snapshots(tmp_path, 0, lambda _: None), []

    def best() -> None:
        attempts.append(len(attempts))
        if len(attempts) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    assert not write(writer, state(1), best)
    assert not write(writer, state(2))
    assert list_snapshots(tmp_path) == []
    assert write(writer, state(3))
    assert write(writer, state(4))
    assert len(attempts) == 3


def test_a_file_system_without_hard_links_gets_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    write(Snapshots(tmp_path, 0, print), state(1))
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 1


def test_copies_share_nothing() -> None:
    source = {"a": [torch.ones(2), {"b": (torch.zeros(1), "x", None)}]}
    copied = copy_to_cpu(source)
    source["a"][0].fill_(5)  # type: ignore[union-attr]
    assert copied["a"][0].tolist() == [1, 1]
    assert copied["a"][1]["b"][1:] == ("x", None)

"""Checkpoints are whole or refused, hold no code, and a failed write leaves the old one."""

import errno
import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve.contract.files import file_sha256
from train.checkpoint import (
    MARK,
    CheckpointError,
    best_checkpoint,
    load_checkpoint,
    load_with_digest,
    save_checkpoint,
)
from train.runs.history import History

STATE: dict[str, Any] = {
    "model": {"weight": torch.arange(6.0).view(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)},
    "epoch": 3,
    "class_names": ["cat", "고양이"],
    "nested": {"a": [1, 2.5, None, True, ("x", 1)]},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "checkpoints" / "last.pt"
    save_checkpoint(STATE, file)
    return file


def signed(payload: bytes) -> bytes:
    return payload + MARK + hashlib.sha256(payload).digest()


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("it-ran",)


def test_what_is_saved_is_loaded(path: Path) -> None:
    state = load_checkpoint(path)
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert torch.equal(state["model"]["half"], STATE["model"]["half"])
    assert {key: state[key] for key in ("epoch", "class_names", "nested")} == {
        key: STATE[key] for key in ("epoch", "class_names", "nested")
    }


def test_torch_itself_can_read_the_file(path: Path) -> None:
    assert torch.load(path, weights_only=True)["epoch"] == 3


def test_each_single_flipped_bit_is_refused(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    bits = np.random.default_rng(0).choice(8 * len(data), 200, replace=False)
    for bit in bits.tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "damaged.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"\.pt .*SHA-256"):
            load_checkpoint(tmp_path / "damaged.pt")


@pytest.mark.parametrize("kept", [0, 1, 39, 40, 41, 500, -41, -40, -1])
def test_a_truncated_file_is_refused(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"\.pt .*SHA-256"):
        load_checkpoint(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone.pt .*No such file"):
        load_checkpoint(tmp_path / "gone.pt")


def test_a_file_in_place_of_its_run_is_an_error_that_names_the_run(path: Path) -> None:
    with pytest.raises(CheckpointError, match="run directory"):
        load_checkpoint(best_checkpoint(path))


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"format_version": 99}, buffer)
    (tmp_path / "a.pt").write_bytes(signed(buffer.getvalue()))
    with pytest.raises(CheckpointError, match=r"a.pt .*format_version 99\b.*1$"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("failing", [1, 2], ids=["file", "folder"])
def test_a_write_that_fails_leaves_a_whole_file_and_no_temporary_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    calls = 0

    def fsync(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint({"epoch": 4}, path)
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]
    assert load_checkpoint(path)["epoch"] == (3 if failing == 1 else 4)


def test_the_digest_is_of_the_bytes_that_were_loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running training may replace the file that is being exported."""
    before, load = file_sha256(path), torch.load

    def replaced_meanwhile(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        save_checkpoint({"epoch": 9}, path)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", replaced_meanwhile)
    state, digest = load_with_digest(path)
    assert (state["epoch"], digest) == (3, before)
    assert load_with_digest(path)[1] == file_sha256(path) != before


def test_a_write_that_succeeds_leaves_no_temporary_file(path: Path) -> None:
    save_checkpoint({"epoch": 4}, path)
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]
    assert load_checkpoint(path)["epoch"] == 4


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), History(), Path("x"), RunsCode()], ids=type)
def test_anything_but_tensors_and_plain_types_is_refused_before_writing(path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"last.pt"):
        save_checkpoint({"value": value}, path)
    assert load_checkpoint(path)["epoch"] == 3


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with a right checksum, which anybody can compute."""
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"format_version": 1, "model": RunsCode()}, buffer)
    for name, payload in (("zip.pt", buffer.getvalue()), ("bare.pt", pickle.dumps(RunsCode(), protocol=2))):
        (tmp_path / name).write_bytes(signed(payload))
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "it-ran").exists()

"""Checkpoint files of tensors and plain Python types, written whole or not at all, and checked when read.

A file is its torch archive followed by 40 bytes: an 8-byte mark and the SHA-256 of all that precedes.
"""

import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from serve.contract.errors import UserError
from serve.contract.files import atomic_write

CHECKPOINTS, BEST, LAST = "checkpoints", "best.pt", "last.pt"  # folder and files of a run
MARK = b"PUREBRED"
TRAILER_BYTES = len(MARK) + 32
FORMAT_VERSION = 1


class CheckpointError(UserError):
    """A file is no whole checkpoint of this project; the message names the file and the reason."""


def checkpoint_folder(run: str | Path) -> Path:
    """Return the folder of a run directory that holds its checkpoints."""
    return Path(run) / CHECKPOINTS


def best_checkpoint(run: str | Path) -> Path:
    """Return the path of a run's checkpoint of its best epoch."""
    return checkpoint_folder(run) / BEST


def last_checkpoint(run: str | Path) -> Path:
    """Return the path of a run's checkpoint at the end of its last epoch."""
    return checkpoint_folder(run) / LAST


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write `state` whole or not at all; it is on the disk when this returns.

    Raises:
        CheckpointError: `state` holds something that `weights_only` loading would refuse.
    """
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **state}, buffer)
    payload = buffer.getbuffer()
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: not tensors and plain types alone: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(payload)
        file.write(MARK + hashlib.sha256(payload).digest())


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return the content of a checkpoint after a check of its SHA-256, loaded with `weights_only`.

    Raises:
        CheckpointError: the file is missing, damaged, truncated, of another format version, or holds more
            than tensors and plain types.
    """
    return load_with_digest(path, device)[0]


def load_with_digest(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Any], str]:
    """Return what `load_checkpoint` does and the file's SHA-256 in hexadecimal digits, of the same bytes: a
    running training may replace the file between two reads."""
    try:
        data = path.read_bytes()
    except OSError as error:
        is_file = isinstance(error, NotADirectoryError)
        reason = "give a run directory, not a file in one" if is_file else error.strerror
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason}") from error
    payload, trailer = data[:-TRAILER_BYTES], data[-TRAILER_BYTES:]
    if trailer[: len(MARK)] != MARK or trailer[len(MARK) :] != hashlib.sha256(payload).digest():
        raise CheckpointError(f"checkpoint {path} is damaged or truncated: its SHA-256 does not match")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"checkpoint {path}: not tensors and plain types alone: {error}") from error
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format_version {state.get('format_version')}, "
            f"this version reads {FORMAT_VERSION}"
        )
    return state, hashlib.sha256(data).hexdigest()


def has_checksum(path: Path) -> bool:
    """Return whether `save_checkpoint` wrote this file, by the mark in its trailer."""
    with open(path, "rb") as file:
        file.seek(-min(TRAILER_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return file.read(len(MARK)) == MARK

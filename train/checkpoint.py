"""Checkpoints: tensors and plain Python types only, written whole or not at all, checked when read.

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

MARK = b"PUREBRED"
TRAILER_BYTES = len(MARK) + 32
FORMAT_VERSION = 1


class CheckpointError(UserError):
    """This file is not a whole checkpoint of ours; the message says what is wrong."""


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write to a temporary file, sync, rename, sync the folder.

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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(payload)
            file.write(MARK + hashlib.sha256(payload).digest())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Check the SHA-256, then load with weights_only.

    Raises:
        CheckpointError: missing, damaged, truncated, of another format version, or with other than
            tensors and plain types inside.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
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
    return state


def has_checksum(path: Path) -> bool:
    """Whether `save_checkpoint` wrote this file, by the mark in its trailer."""
    with open(path, "rb") as file:
        file.seek(-min(TRAILER_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return file.read(len(MARK)) == MARK

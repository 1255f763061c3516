"""Snapshots of a run, in an epoch and after each: written whole, checked when read, the newest two kept.

checkpoints/epoch-000003-step-00000120.pt is 3 epochs and 120 steps of the fourth; last.pt is the newest at
the end of an epoch, under the name that other commands know.
"""

import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from serve.contract.files import atomic_path
from train.checkpoint import LAST, CheckpointError, load_checkpoint, save_checkpoint

NAME = re.compile(r"epoch-\d{6,}-step-\d{8,}\.pt")
KEPT = 2

Say = Callable[[str], None]


@dataclass
class Position:
    """How far the running epoch is."""

    step: int = 0
    """Optimizer steps of it that are done; all of them when only its evaluation is to come."""
    sums: list[list[float]] = field(default_factory=list)
    """Of each rank: what the epoch's metrics are made from."""
    skipped: list[int] = field(default_factory=list)
    retuning: bool = False
    """It is one of the last stage, that of train/engine/retune.py."""


class Snapshots:
    """Writes snapshots into `folder`; one rank alone has it.

    A write that fails is said loudly and costs nothing but that snapshot: those before it stay.
    """

    def __init__(self, folder: Path, minutes: float, say: Say, written: Callable[[], None] = lambda: None):
        """`written` is called after each one."""
        self.folder, self.seconds, self.say, self.written = folder, 60 * minutes, say, written
        for left in folder.glob(".*.tmp"):  # by a process that was killed; one at a time writes here
            left.unlink()
        self.began = time.monotonic()
        self.writing: threading.Thread | None = None
        self.owed: Callable[[], None] | None = None
        """Must be written before anything that refers to it; kept until that succeeds."""

    def due(self) -> bool:
        """`minutes` have passed since the last one began, and none is being written."""
        return bool(self.seconds) and time.monotonic() - self.began >= self.seconds and not self._busy()

    def begin(self, state: dict[str, Any]) -> bool:
        """Copy the state now and write it in the background; False if the one before is not done yet."""
        if self._busy():
            return False
        self.began = time.monotonic()
        copied = copy_to_cpu(state)
        self.writing = threading.Thread(target=self._write, args=(copied,), name="snapshot")
        self.writing.start()
        return True

    def write(self, state: dict[str, Any], before: Callable[[], None] | None = None) -> bool:
        """Write now, after what is being written and after `before`; False if it failed."""
        self.finish()
        self.began = time.monotonic()
        if before is not None:
            self.owed = before
        return self._write(state)

    def finish(self) -> None:
        """Wait for what is being written in the background."""
        if self.writing is not None:
            self.writing.join()

    def _busy(self) -> bool:
        return self.writing is not None and self.writing.is_alive()

    def _write(self, state: dict[str, Any]) -> bool:
        try:
            if self.owed is not None:
                self.owed()
                self.owed = None
            path = self.folder / snapshot_name(state)
            save_checkpoint(state, path)
            if state["position"]["step"] == 0:
                _link(path, self.folder / LAST)
            for old in list_snapshots(self.folder)[KEPT:]:
                old.unlink()
            self.written()
        except OSError as error:
            self.say(
                f"WARNING: NO SNAPSHOT WAS WRITTEN: {error}. Training goes on; when it is interrupted, "
                f"work since the last whole one is lost. Make room in {self.folder}"
            )
            return False
        return True


def snapshot_name(state: dict[str, Any]) -> str:
    return f"epoch-{state['epoch']:06d}-step-{state['position']['step']:08d}.pt"


def list_snapshots(folder: Path) -> list[Path]:
    """Newest first."""
    if not folder.is_dir():
        return []

    found = (path for path in folder.iterdir() if NAME.fullmatch(path.name))
    return sorted(found, key=place_of, reverse=True)


def place_of(snapshot: Path) -> tuple[int, int]:
    """Epochs, and steps of the next one, that it was written after."""
    epochs, steps = re.findall(r"\d+", snapshot.name)
    return int(epochs), int(steps)


def newest_whole(folder: Path, say: Say) -> Path | None:
    """The newest snapshot whose checksum is right; None if there never was any.

    A damaged one is named and set aside as NAME.damaged, and the one before is taken.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    candidates = [*list_snapshots(folder), *(p for p in [folder / LAST] if p.exists())]
    for path in candidates:
        try:
            load_checkpoint(path, "meta")
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):
                raise  # the file system's fault, not the file's
            aside = path.with_name(path.name + ".damaged")
            path.replace(aside)
            say(f"warning: {error}; it is set aside as {aside.name}, and the one before it is used")
            continue
        return path
    if candidates:
        raise CheckpointError(
            f"all checkpoints in {folder} are damaged ({', '.join(path.name for path in candidates)}): "
            "start a new run under another --name"
        )
    return None


def copy_to_cpu(value: Any) -> Any:
    """Tensors copied, so that training can change its own; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to_cpu(item) for item in value)
    return value


def _link(path: Path, name: Path) -> None:
    """Give a file a second name, in place of whatever has it, without a moment in which none has."""
    try:
        with atomic_path(name) as temporary:
            os.link(path, temporary)
    except OSError:  # a file system without hard links
        save_checkpoint(load_checkpoint(path), name)

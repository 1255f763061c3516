"""Snapshots: checkpoints of a run in an epoch and after each, of which the newest two are kept.

checkpoints/epoch-000003-step-00000120.pt is 3 epochs and 120 steps of the fourth; last.pt is the newest at
the end of an epoch, under the name that other commands know.
"""

import os
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from serve.contract.errors import UserError
from serve.contract.files import atomic_path
from train.checkpoint import LAST, CheckpointError, load_checkpoint, save_checkpoint
from train.distributed import Log, Ranks, on_main

NAME = re.compile(r"epoch-\d{6,}-step-\d{8,}\.pt")
KEPT = 2


@dataclass
class Position:
    """How far an epoch is."""

    step: int = 0
    """Optimizer steps that are done; all of them when only the evaluation is left."""
    sums: list[list[float]] = field(default_factory=list)
    """What the epoch's metrics are made from, for each rank."""
    skipped: list[int] = field(default_factory=list)
    retuning: bool = False
    """The epoch belongs to the last stage (train/engine/retune.py)."""


class NullSnapshots:
    """The interface, and what ranks other than 0 have."""

    def due(self) -> bool:
        return False

    def begin(self, state: dict[str, Any]) -> bool:
        return False

    def write(
        self,
        state: dict[str, Any],
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None: ...
    def finish(self) -> bool:
        return True

    def write_pending(self) -> None: ...


class Snapshots(NullSnapshots):
    """Writes snapshots into a folder, in a thread, one at a time.

    A write that fails costs a loud warning and that snapshot: those before it stay. Any error but the file
    system's is raised by the next call.
    """

    def __init__(self, folder: Path, minutes: float, log: Log, written: Callable[[], None] = lambda: None):
        """`written` is called after each snapshot."""
        self.folder, self.seconds, self.log, self.written = folder, 60 * minutes, log, written
        for left in folder.glob(".*.tmp"):  # by a process that was killed; one at a time writes here
            left.unlink()
        self.began = time.monotonic()
        self.thread = ThreadPoolExecutor(1, "snapshot")
        self.writing: Future[bool] | None = None
        self.pending: Callable[[], None] | None = None
        """Writes what the next snapshot refers to; kept until it succeeds."""

    def due(self) -> bool:
        """Return whether `minutes` have passed since the last snapshot began, and none is being written."""
        return bool(self.seconds) and time.monotonic() - self.began >= self.seconds and not self._busy()

    def begin(self, state: dict[str, Any]) -> bool:
        """Copy the state now and write it in the background; False if the one before is not done yet."""
        if self._busy():
            return False
        self.write(copy_to_cpu(state))
        return True

    def write(
        self,
        state: dict[str, Any],
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Wait for what is being written, then write `before` and the state in the background.

        Nobody may change the state any more. `after` is called in the background, also if a write failed.
        """
        self.finish()
        self.began = time.monotonic()
        if before is not None:
            self.pending = before
        self.writing = self.thread.submit(self._write, state, after or (lambda: None))

    def finish(self) -> bool:
        """Wait for what is being written; return False if that failed."""
        writing, self.writing = self.writing, None
        return writing is None or writing.result()

    def write_pending(self) -> None:
        """Write the best checkpoint, or raise UserError, if no later snapshot has done so."""
        if self.pending is None:
            return
        try:
            self.pending()
        except OSError as error:
            raise UserError(
                f"the best checkpoint cannot be written: {error}. Make room in {self.folder}; the newest "
                "snapshot is whole"
            ) from error

    def _busy(self) -> bool:
        return self.writing is not None and not self.writing.done()

    def _write(self, state: dict[str, Any], after: Callable[[], None]) -> bool:
        try:
            if self.pending is not None:
                self.pending()
                self.pending = None
            step = state["position"]["step"]
            path = self.folder / f"epoch-{state['epoch']:06d}-step-{step:08d}.pt"
            save_checkpoint(state, path)
            if step == 0:
                _link(path, self.folder / LAST)
            for old in list_snapshots(self.folder)[KEPT:]:
                old.unlink()
            self.written()
        except OSError as error:
            self.log(
                f"WARNING: NO SNAPSHOT WAS WRITTEN: {error}. Training continues; when it is interrupted, "
                f"work since the last whole one is lost. Make room in {self.folder}"
            )
            return False
        finally:
            after()
        return True


def list_snapshots(folder: Path) -> list[Path]:
    """Return the snapshots in a folder, newest first."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if NAME.fullmatch(path.name))
    return sorted(found, key=snapshot_position, reverse=True)


def snapshot_position(snapshot: Path) -> tuple[int, int]:
    """Return the epochs, and steps of the next one, that a snapshot was written after."""
    epochs, steps = re.findall(r"\d+", snapshot.name)
    return int(epochs), int(steps)


def newest_whole(folder: Path, log: Log) -> Path | None:
    """Return the newest snapshot whose checksum is right, or None if there never was any.

    A damaged one is renamed to NAME.damaged, with a warning, and the one before is taken. Raises
    CheckpointError if all are damaged.
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
            log(f"warning: {error}; it is renamed to {aside.name}, and the one before it is used")
            continue
        return path
    if candidates:
        raise CheckpointError(
            f"all checkpoints in {folder} are damaged ({', '.join(path.name for path in candidates)}): "
            "start a new run under another --name"
        )
    return None


def load_newest(folder: Path, ranks: Ranks, log: Log) -> dict[str, Any] | None:
    """Return the newest whole snapshot on every rank; None when the run ended before its first."""
    path = on_main(ranks, lambda: newest_whole(folder, log))
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    step = checkpoint["position"]["step"]
    log(f"resuming from {path}: {checkpoint['epoch']} epochs and {step} steps are done")
    return checkpoint


def copy_to_cpu(value: Any) -> Any:
    """Return the value with its tensors copied, so that training can change its own."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to_cpu(item) for item in value)
    return value


def _link(path: Path, name: Path) -> None:
    """Give a file a second name, atomically in place of whatever has it."""
    try:
        with atomic_path(name) as temporary:
            os.link(path, temporary)
    except OSError:  # a file system without hard links
        save_checkpoint(load_checkpoint(path), name)

"""Trackers: the interface, one that does nothing, one that writes metrics.jsonl, and the choice of one."""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from serve.contract.files import atomic_write
from train.config import TrainConfig


class NullTracker:
    """The interface, and the tracker of ranks other than 0."""

    run_id: str = ""
    rows: Sequence[dict[str, Any]] = ()
    """One for each epoch so far: {"epoch", "time", metric: value, ...}."""

    def start(self, parameters: dict[str, Any], *datasets: tuple[str, str]) -> None: ...
    def log_metrics(self, epoch: int, values: dict[str, float]) -> None: ...
    def send(self) -> None: ...
    def log_best(self, epoch: int, values: dict[str, float]) -> None: ...
    def log_note(self, text: str) -> None: ...
    def log_files(self, paths: list[Path]) -> None: ...
    def end(self, status: str) -> None: ...


class MetricsFile(NullTracker):
    """Metrics in metrics.jsonl alone, a line for each epoch."""

    rows: list[dict[str, Any]]

    def __init__(self, path: Path, epochs_done: int):
        """Lines after `epochs_done` are of epochs that are trained again, and are dropped."""
        self.path = path
        self.rows = [row for row in read_metrics(path) if row["epoch"] <= epochs_done]
        self.whole = True
        if path.exists():
            self._rewrite()

    def _rewrite(self) -> None:
        with atomic_write(self.path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)

    def log_metrics(self, epoch: int, values: dict[str, float]) -> None:
        row = {"epoch": epoch, "time": time.time(), **values}
        self.rows.append(row)
        try:
            if not self.whole:
                self._rewrite()
            else:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    os.fsync(file.fileno())  # before the epoch's checkpoint, which is on the disk, too
            self.whole = True
        except OSError as error:
            self.whole = False
            print(f"WARNING: {self.path} was not written: {error}; the next epoch tries again", flush=True)


def build_tracker(
    config: TrainConfig, is_main: bool, path: Path, epochs_done: int, run_id: str, url: str = ""
) -> NullTracker:
    """Return the tracker of a rank: only rank 0 has one that does anything, and imports mlflow. `url`: of
    the run directory, "" if it is kept on this machine."""
    if not is_main:
        return NullTracker()
    if not config.track:
        return MetricsFile(path, epochs_done)
    from train.tracking.mlflow_tracker import MlflowTracker  # seconds

    return MlflowTracker(config, path, epochs_done, run_id, url)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows, without lines that cannot be read: one that a crash cut off is trained again."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows

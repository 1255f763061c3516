"""A training run in MLflow. Metrics are always written to metrics.jsonl first.

MLflow may be away, slow or broken: a thread of its own talks to it, training goes on, and what MLflow
missed is sent later, by the thread or by train/sync.py. tracking.json in the run directory says what.
"""

import json
import os
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train.config import TrainConfig
from train.fetch import is_remote
from train.metrics_file import MetricsFile
from train.tracking import connect, log_dataset, log_points, metric_name, mlflow

SYSTEM_METRICS_SECONDS = 5
START_SECONDS = 20.0  # training waits so long for the run's ID, which its checkpoints name
END_SECONDS = 10.0  # and so long at its end; torchrun gives a process that is told to stop 30 s
UPLOAD_SECONDS = 600.0  # but so long for files that are on their way when all is done
RETRY_SECONDS = 15.0
LAST_TRIES = 3  # a locked database is free in a moment
RUN_TAGS = "PUREBRED_RUN_TAGS"  # environment variable: a sweep tells a trial's run whose child it is (JSON)
KEY_TAG = "purebred.key"
# an epoch that is done again has other values, and no better
OF_ITS_EXECUTION = ("images_per_second", "data_share")


@dataclass
class Record:
    """What MLflow should have of a run, but for its metrics; kept in tracking.json."""

    name: str
    experiment: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """A tag by which the run is found again when its ID never reached us."""
    tags: dict[str, str] = field(default_factory=dict)
    run_id: str = ""
    asked: bool = False
    """MLflow was asked to make the run, and may have done so."""
    parameters: dict[str, Any] = field(default_factory=dict)
    data_source: str = ""
    data_digest: str = ""
    dataset_logged: bool = False
    best_epoch: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Metrics of that epoch, which are logged once more as best/NAME: MLflow sorts runs by last values."""
    files: list[str] = field(default_factory=list)
    """Files and folders that are still to be logged, relative to the run directory."""
    status: str = "RUNNING"
    complete: bool = False
    """MLflow has all of it, the final status too."""

    def save(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        temporary.replace(path)


def read_record(path: Path) -> Record | None:
    """None if there is none, or none that can be read."""
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


class Sender:
    """Brings MLflow's run up to date with a record and rows; what fails is tried again by the next call.

    Everything may be repeated and is logged once. Use it in one thread: MLflow's active run is of one.
    """

    def __init__(self, record: Record, path: Path, rows: list[dict[str, Any]], system_metrics: bool = True):
        self.record, self.path, self.rows, self.system_metrics = record, path, rows, system_metrics
        self.resumed = record.asked or bool(record.run_id)
        self.opened = self.parameters_logged = self.ended = self.uploading = False
        self.sent = 0
        self.known: dict[str, dict[int, float]] = {}
        """Of a run that goes on, what MLflow has of each metric: step -> value."""

    def update(self) -> None:
        """Raises whatever mlflow, requests or SQLAlchemy do."""
        status = self.record.status  # looked at before the rows: the last of them comes before the end
        if not self.opened:
            self._open_run()
        if not self.parameters_logged:
            self._log_parameters()
        if not self.record.dataset_logged:
            log_dataset(self.record.data_source, self.record.data_digest)
            self.record.dataset_logged = True
        self._send_rows()
        self._send_best()
        self.uploading = True
        try:
            while self.record.files:
                _log_path(self.path.parent / self.record.files[0])
                del self.record.files[0]
        finally:
            self.uploading = False
        if status != "RUNNING" and not self.ended:
            mlflow.end_run(status)
            self.ended = self.record.complete = True
        self.record.save(self.path)

    def _open_run(self) -> None:
        connect()
        record = self.record
        experiment = mlflow.set_experiment(record.experiment).experiment_id
        mlflow.set_system_metrics_sampling_interval(SYSTEM_METRICS_SECONDS)
        if not record.run_id and record.asked:
            asked_for = f"tags.`{KEY_TAG}` = '{record.key}'"
            found = mlflow.MlflowClient().search_runs([experiment], asked_for, max_results=1)
            record.run_id = found[0].info.run_id if found else ""
        which: dict[str, Any] = {"run_id": record.run_id} if record.run_id else {"run_name": record.name}
        if not record.run_id:
            record.asked = True
            record.save(self.path)
        tags = {**record.tags, KEY_TAG: record.key}  # also of a run that goes on, as another trial
        opened = mlflow.start_run(**which, tags=tags, log_system_metrics=self.system_metrics)
        record.run_id = opened.info.run_id
        record.save(self.path)
        self.opened = True

    def _log_parameters(self) -> None:
        """MLflow keeps a parameter's first value: a resumed run logs what changed as resume.EPOCH.NAME."""
        values = {key: str(value) for key, value in self.record.parameters.items()}
        if self.resumed:
            known = mlflow.get_run(self.record.run_id).data.params
            changed = {k: v for k, v in values.items() if known.get(k, v) != v}
            values = {k: v for k, v in values.items() if k not in known}
            values |= {f"resume.{len(self.rows)}.{k}": v for k, v in changed.items()}
        params = [mlflow.entities.Param(key, value) for key, value in values.items()]
        for start in range(0, len(params), 100):  # MLflow's limit for one call
            mlflow.MlflowClient().log_batch(self.record.run_id, params=params[start : start + 100])
        self.parameters_logged = True

    def _send_rows(self) -> None:
        rows = self.rows[self.sent :]
        points = [
            mlflow.entities.Metric(metric_name(name), value, int(row["time"] * 1000), row["epoch"])
            for row in rows
            for name, value in row.items()
            if name not in ("epoch", "time") and not self._has(name, value, row["epoch"])
        ]
        log_points(self.record.run_id, points)
        self.sent += len(rows)

    def _send_best(self) -> None:
        at = [int(row["time"] * 1000) for row in self.rows if row["epoch"] == self.record.best_epoch]
        if at:  # the same point, however often it is sent
            values = {"best/epoch": float(self.record.best_epoch)}
            values |= {metric_name(f"best/{name}"): value for name, value in self.record.best.items()}
            epoch = self.record.best_epoch
            log_points(
                self.record.run_id,
                [mlflow.entities.Metric(key, value, at[0], epoch) for key, value in values.items()],
            )

    def _has(self, name: str, value: float, epoch: int) -> bool:
        """Whether MLflow knows this already; an epoch that was done again may have another time."""
        if not self.resumed:
            return False
        key = metric_name(name)
        if key not in self.known:
            history = mlflow.MlflowClient().get_metric_history(self.record.run_id, key)
            self.known[key] = {metric.step: metric.value for metric in history}
        if epoch not in self.known[key]:
            return False
        return name in OF_ITS_EXECUTION or np.array_equal(self.known[key][epoch], value, equal_nan=True)


class MlflowTracker(MetricsFile):
    """Exactly one MLflow run for a training run, also after a resume (`run_id`)."""

    def __init__(self, config: TrainConfig, path: Path, epochs_done: int, run_id: str):
        super().__init__(path, epochs_done)
        place = path.with_name("tracking.json")
        known = read_record(place)
        self.record = known or Record(config.name, config.experiment, dataset_logged=bool(run_id))
        self.record.run_id = self.record.run_id or run_id
        self.record.status, self.record.complete = "RUNNING", False
        self.sender = Sender(self.record, place, self.rows)
        self.wake, self.tried, self.over = threading.Event(), threading.Event(), threading.Event()
        self.ending = False
        self.thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    @property
    def run_id(self) -> str:  # type: ignore[override]
        return self.record.run_id

    def start(self, parameters: dict[str, Any], data_source: str, data_digest: str) -> None:
        """Waits START_SECONDS at most for the run to be opened."""
        self.record.parameters = {key: str(value) for key, value in parameters.items()}
        place = data_source if is_remote(data_source) else str(Path(data_source).resolve())
        self.record.data_source, self.record.data_digest = place, data_digest
        self.record.tags |= json.loads(os.environ.get(RUN_TAGS, "{}"))
        self.record.save(self.sender.path)
        self.thread.start()
        if not self.tried.wait(START_SECONDS):
            print("warning: MLflow is slow; training begins meanwhile", flush=True)

    def send(self) -> None:
        self.wake.set()

    def log_best(self, epoch: int, values: dict[str, float]) -> None:
        self.record.best_epoch, self.record.best = epoch, values

    def log_files(self, paths: list[Path]) -> None:
        """Files go to the run's root, folders below their own name."""
        home = self.path.parent.resolve()
        self.record.files += [os.path.relpath(path.resolve(), home) for path in paths]
        self.wake.set()

    def end(self, status: str) -> None:
        """`status` is FINISHED, FAILED or KILLED. Waits END_SECONDS at most, UPLOAD_SECONDS for files of a
        finished run while they are being sent."""
        self.record.status, self.ending = status, True
        with suppress(OSError):  # a full disk, perhaps
            self.record.save(self.sender.path)
        self.wake.set()
        deadline = time.monotonic() + UPLOAD_SECONDS
        self.over.wait(END_SECONDS)
        while status == "FINISHED" and self.sender.uploading and time.monotonic() < deadline:
            self.over.wait(1)
        self.over.wait(1 if status == "FINISHED" else 0)  # the status follows the files
        if not self.record.complete:
            folder = self.path.parent
            print(
                f"warning: MLflow missed something of this run; metrics are in {self.path}, and\n"
                f"python train/sync.py {folder} sends all of it when MLflow is back",
                flush=True,
            )

    def _work(self) -> None:
        behind, left = False, LAST_TRIES
        while True:
            try:
                self.sender.update()
                if behind:
                    print("MLflow answers again, and has what it missed", flush=True)
                behind = False
            except Exception as error:  # mlflow raises its own, requests' and SQLAlchemy's exceptions
                if not behind:
                    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                    print(
                        f"warning: MLflow does not answer; its records are kept for later: {reason}",
                        flush=True,
                    )
                behind = True
            self.tried.set()
            if self.ending:
                left -= 1
                if self.record.complete or not left:
                    break
                time.sleep(1)
                continue
            self.wake.wait(RETRY_SECONDS if behind else None)
            self.wake.clear()
        self.over.set()


def _log_path(path: Path) -> None:
    if path.is_dir():
        mlflow.log_artifacts(str(path), path.name)
    elif not path.exists():  # deleted since
        print(f"warning: {path} is gone, and not in MLflow", flush=True)
    else:
        mlflow.log_artifact(str(path))


def child_environment(parent: str, tags: dict[str, str]) -> dict[str, str]:
    """For a training process: its run becomes a child of the run `parent`, with these tags."""
    return {RUN_TAGS: json.dumps({**tags, "mlflow.parentRunId": parent} if parent else tags)}

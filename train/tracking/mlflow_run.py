"""A training run in MLflow. Metrics are always written to metrics.jsonl first.

MLflow may be away, slow or broken: a thread of its own talks to it, training goes on, and what MLflow
missed is sent later, by the thread or by train/sync.py. tracking.json in the run directory says what.
"""

import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serve.contract.files import file_sha256
from serve.contract.metadata import BEST_CHECKPOINT_TAG
from train.checkpoint import best_checkpoint
from train.config import TrainConfig
from train.data.download import is_remote
from train.tracking.base import MetricsFile
from train.tracking.client import (
    check_artifact_folder,
    choose_experiment,
    log_dataset,
    log_points,
    metric_name,
    mlflow,
    store_uri,
)
from train.tracking.mlflow_errors import RefusedError, explain, is_about_schema, may_pass, without_passwords
from train.tracking.mlflow_open import changes, free_name, open_run, save
from train.tracking.refusals import Refusals
from train.tracking.run_record import Record, read_record

SYSTEM_METRICS_SECONDS = 5
START_SECONDS = 20.0  # training waits so long for the run's ID, which its checkpoints name
END_SECONDS = 10.0  # and so long at its end; torchrun gives a process that is told to stop 30 s
UPLOAD_SECONDS = 600.0  # but so long for files that are on their way when all is done
RETRY_SECONDS = 15.0
LAST_TRIES = 3  # a locked database is free in a moment
RUN_TAGS = "PUREBRED_RUN_TAGS"  # environment variable: a sweep tells a trial's run whose child it is (JSON)
RESUMED_TAG = "purebred.resumed"
# an epoch that is done again has other values, and no better
OF_ITS_EXECUTION = ("images_per_second", "data_share")


class Sender:
    """Brings MLflow's run up to date with a record and rows. The next call sends again what failed, unless
    MLflow refuses it.

    Everything may be repeated and is logged once. Use it in one thread: MLflow's active run is of one.
    """

    def __init__(self, record: Record, path: Path, rows: list[dict[str, Any]], system_metrics: bool = True):
        self.record, self.path, self.rows, self.system_metrics = record, path, rows, system_metrics
        self.resumed = record.asked or bool(record.run_id)
        self.opened = self.parameters_logged = self.ended = self.uploading = self.waited = False
        self.sent = self.best_sent = 0
        self.known: dict[str, dict[int, float]] = {}
        """Of a resumed run, what MLflow has of each metric: step -> value."""
        self.refused = Refusals()

    @property
    def done(self) -> bool:
        """Nothing is left to send but what MLflow refuses."""
        return self.ended and set(self.record.files) <= set(self.refused.names("files"))

    def update(self) -> None:
        """
        Raises:
            RefusedError: the run cannot be opened, now or later.
            Exception: whatever mlflow, requests, SQLAlchemy and artifact stores raise that may pass.
        """
        status = self.record.status  # read before the rows: the last of them comes before the end
        if not self.opened:
            self._open_run()
        attempt = self.refused.attempt
        if not self.parameters_logged:
            attempt("parameters", self._log_parameters)
        if not self.record.dataset_logged:
            attempt("the data set", self._log_dataset)
        attempt("metrics", self._send_rows)
        attempt("metrics", self._send_best)
        if status != "RUNNING" and not self.ended:  # before the files, which may be many, large or refused
            attempt("tags", self._tag_best_checkpoint)
            attempt("the status", lambda: self._end(status))
            self.ended = True
        save(self.record, self.path)
        self._send_files()
        if self.done:
            self.close()
            self.record.complete = not self.refused.by_kind
        save(self.record, self.path)

    def close(self) -> None:
        """Leave the run, which is active in this thread."""
        with suppress(Exception):
            mlflow.end_run(self.record.status)

    def _open_run(self) -> None:
        system = SYSTEM_METRICS_SECONDS if self.system_metrics else 0
        try:
            self.resumed |= open_run(self.record, self.path, system)
        except Exception as error:
            if is_about_schema(error) and self.record.status == "RUNNING" and not self.waited:
                self.waited = True
                time.sleep(RETRY_SECONDS)  # another run may be making the store just now
                self._open_run()
                return
            if may_pass(error):
                raise
            raise RefusedError(explain(error, store_uri(), self.record.uri)) from error
        self.refused.store, self.refused.recorded = store_uri(), self.record.uri
        self.opened = True

    def _log_dataset(self) -> None:
        log_dataset(self.record.data_source, self.record.data_digest)
        self.record.dataset_logged = True

    def _tag_best_checkpoint(self) -> None:
        """What was exported from it while MLflow did not have this run is linked to it by this tag."""
        path = best_checkpoint(self.path.parent)
        if path.is_file():
            mlflow.set_tag(BEST_CHECKPOINT_TAG, file_sha256(path))

    def _end(self, status: str) -> None:
        """mlflow.end_run would do nothing the second time, if this fails."""
        mlflow.MlflowClient().set_terminated(self.record.run_id, status)

    def _log_parameters(self) -> None:
        """A resumed run logs what changed as resume.EPOCH.NAME, and in a tag."""
        values = {key: str(value) for key, value in self.record.parameters.items()}
        if self.resumed:
            data, epoch = mlflow.get_run(self.record.run_id).data, len(self.rows)
            changed = changes(data.params, values)
            values = {k: v for k, v in values.items() if k not in data.params}
            values |= {free_name(data.params, epoch, k): new for k, (_, new) in changed.items()}
            if changed:
                texts = [f"{key} {old} -> {new}" for key, (old, new) in changed.items()]
                text = f"after epoch {epoch}: {', '.join(texts)}"
                before = data.tags.get(RESUMED_TAG, "")
                if not before.endswith(text):  # of an attempt that failed further on
                    mlflow.set_tag(RESUMED_TAG, f"{before}; {text}" if before else text)
        params = [mlflow.entities.Param(key, value) for key, value in values.items()]
        for start in range(0, len(params), 100):  # MLflow's limit for one call
            self.refused.send_each("parameters", params[start : start + 100], self._send_parameters)
        self.parameters_logged = True

    def _send_parameters(self, params: Sequence[Any]) -> None:
        mlflow.MlflowClient().log_batch(self.record.run_id, params=params)

    def _send_points(self, points: Sequence[Any]) -> None:
        log_points(self.record.run_id, list(points))

    def _send_rows(self) -> None:
        rows = self.rows[self.sent :]
        points = [
            mlflow.entities.Metric(metric_name(name), value, int(row["time"] * 1000), row["epoch"])
            for row in rows
            for name, value in row.items()
            if name not in ("epoch", "time") and not self._has(name, value, row["epoch"])
        ]
        self.refused.send_each("metrics", points, self._send_points)
        self.sent += len(rows)

    def _send_best(self) -> None:
        epoch, best = self.record.best_epoch, self.record.best
        at = [int(row["time"] * 1000) for row in self.rows if row["epoch"] == epoch]
        if not at or self.best_sent == epoch:
            return
        values = {"best/epoch": float(epoch), **{f"best/{name}": value for name, value in best.items()}}
        points = [
            mlflow.entities.Metric(metric_name(name), value, at[0], epoch)
            for name, value in values.items()
            if not self._has(name, value, epoch)
        ]
        self.refused.send_each("metrics", points, self._send_points)
        self.best_sent = epoch

    def _send_files(self) -> None:
        self.uploading = True
        try:
            for name in list(self.record.files):
                self.refused.attempt("files", partial(self._send_file, name), name)
        finally:
            self.uploading = False

    def _send_file(self, name: str) -> None:
        check_artifact_folder(store_uri(), mlflow.active_run().info.artifact_uri)
        _log_path(self.path.parent / name)
        self.record.files.remove(name)

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
    """Exactly one MLflow run for a training run, also after a resume (`run_id`, by its checkpoint)."""

    def __init__(self, config: TrainConfig, path: Path, epochs_done: int, run_id: str):
        super().__init__(path, epochs_done)
        place = path.with_name("tracking.json")
        known = read_record(place)
        if known is None:
            name, experiment_id = choose_experiment(config.experiment)
            known = Record(config.name, name, run_id=run_id, experiment_id=experiment_id)
            known.dataset_logged = bool(run_id)
        self.record = known
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
        """Kept in the record: train/sync.py sends it also of a run that was killed."""
        self.record.best_epoch, self.record.best = epoch, values
        save(self.record, self.sender.path)

    def log_files(self, paths: list[Path]) -> None:
        """Files go to the run's root, folders below their own name."""
        home = self.path.parent.resolve()
        self.record.files += [os.path.relpath(path.resolve(), home) for path in paths]
        self.wake.set()

    def end(self, status: str) -> None:
        """`status` is FINISHED, FAILED or KILLED. Waits END_SECONDS at most, UPLOAD_SECONDS for files of a
        finished run while they are being sent."""
        self.record.status, self.ending = status, True
        save(self.record, self.sender.path)
        self.wake.set()
        deadline = time.monotonic() + UPLOAD_SECONDS
        self.over.wait(END_SECONDS)
        while status == "FINISHED" and self.sender.uploading and time.monotonic() < deadline:
            self.over.wait(1)
        self.over.wait(1 if status == "FINISHED" else 0)
        if not self.record.complete:
            folder = self.path.parent
            print(
                f"warning: MLflow missed something of this run; metrics are in {self.path}, and\n"
                f"python train/sync.py {folder} sends it when MLflow is back, or takes what it refused",
                flush=True,
            )

    def _work(self) -> None:
        behind, left, printed = False, LAST_TRIES, set()
        while True:
            try:
                self.sender.update()
                if behind:
                    print("MLflow answers again, and has what it missed", flush=True)
                behind = False
            except RefusedError as error:
                print(f"warning: MLflow refuses this run, and is not asked again: {error}", flush=True)
                break
            except Exception as error:  # mlflow raises its own, requests' and SQLAlchemy's exceptions
                if not behind:
                    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                    print(
                        "warning: MLflow does not answer; its records are kept for later: "
                        f"{without_passwords(reason)}",
                        flush=True,
                    )
                behind = True
            for kind, sentence in self.sender.refused.sentences().items():
                if kind not in printed:
                    print(f"warning: {sentence}", flush=True)
                printed.add(kind)
            self.tried.set()
            if self.ending:
                left -= 1
                if self.sender.done or not left:
                    break
                time.sleep(1)
                continue
            self.wake.wait(RETRY_SECONDS if behind else None)
            self.wake.clear()
        self.tried.set()
        self.over.set()


def _log_path(path: Path) -> None:
    if path.is_dir():
        mlflow.log_artifacts(str(path), path.name)
    elif not path.exists():  # deleted since
        print(f"warning: {path} is gone, and not in MLflow", flush=True)
    else:
        mlflow.log_artifact(str(path))


def child_environment(parent: str, tags: dict[str, str]) -> dict[str, str]:
    """For a training process: its run becomes a child of the run `parent`, with these tags. MLFLOW_RUN_ID,
    by which all of them would be one run, is not for it."""
    own = {**tags, "mlflow.parentRunId": parent} if parent else tags
    return {RUN_TAGS: json.dumps(own), "MLFLOW_RUN_ID": ""}

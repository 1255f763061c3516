"""Bring MLflow's run of a training run up to date with tracking.json and metrics.jsonl."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serve.contract.files import file_sha256
from serve.contract.mlflow_tags import BEST_CHECKPOINT_TAG
from train.checkpoint import best_checkpoint
from train.tracking.client import TrackingStore, dataset_input, mlflow, patience_for_files
from train.tracking.contents import (
    NOTE_TAG,
    OF_ITS_EXECUTION,
    changed_parameters,
    metric_name,
    resumed_name,
)
from train.tracking.errors import RefusedError
from train.tracking.opening import open_mlflow_run
from train.tracking.run_record import Record

Metric, Param, RunTag = mlflow.entities.Metric, mlflow.entities.Param, mlflow.entities.RunTag
SYSTEM_METRICS_SECONDS = 5
SCHEMA_SECONDS = 15.0
ALL = "all"  # in place of names


class Sender:
    """Everything may be repeated and is logged once. What MLflow refuses is sent no more, and keeps nothing
    else from being sent."""

    def __init__(self, record: Record, path: Path, rows: list[dict[str, Any]], system_metrics: bool = True):
        """`rows` are those of metrics.jsonl, which may grow; `path` is that of tracking.json."""
        self.record, self.path, self.rows, self.system_metrics = record, path, rows, system_metrics
        self.resumed = record.requested or bool(record.run_id)
        self.store: TrackingStore
        """Since the run is open."""
        self.run: Any = None
        self.monitor: Any = None
        self.parameters_sent = self.ended = self.uploading = self.waited = False
        self.rows_sent = self.best_sent = 0
        self.known: dict[str, dict[int, float]] = {}
        """Of a resumed run, what MLflow has of each metric: step -> value."""
        self.refused: dict[str, tuple[list[str], str]] = {}
        """Kind, as in "metrics" -> the names that are refused, and why the first of them is."""

    @property
    def done(self) -> bool:
        """Nothing is left to send but what MLflow refuses."""
        return self.ended and set(self.record.files) <= set(self._refused("files"))

    @property
    def refusals(self) -> list[str]:
        """A sentence for each kind."""
        return [
            f"{kind} of this run ({names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}): {reason}"
            for kind, (names, reason) in self.refused.items()
        ]

    def update(self) -> None:
        """Send what is missing. Raises RefusedError if the run cannot be opened, now or later, and
        ConnectionError if MLflow does not answer: the next call sends again what failed."""
        status = self.record.status  # read before the rows: the last of them comes before the end
        if self.run is None:
            self._open()
        if not self.parameters_sent:
            self._attempt("parameters", self._send_parameters)
        if not self.record.dataset_logged:
            self._attempt("the data set", self._send_dataset)
        self._attempt("metrics", self._send_rows)
        self._attempt("metrics", self._send_best)
        if status != "RUNNING" and not self.ended:  # before the files, which may be many, large or refused
            self._attempt("tags", self._send_final_tags)
            lost = int(1000 * self.rows[-1]["time"]) if self.rows else None  # when its processes were lost
            ended = self.record.ended or lost
            self._attempt(
                "the status", lambda: self._client.set_terminated(self.record.run_id, status, ended)
            )
            self.ended = True
        self.record.save(self.path)
        try:
            self.uploading = True
            with patience_for_files():
                for name in list(self.record.files):
                    self._attempt("files", partial(self._send_file, name), name)
        finally:
            self.uploading = False
        if self.done:
            if self.monitor is not None:
                self.monitor.finish()
                self.monitor = None
            self.record.complete = not self.refused
        self.record.save(self.path)

    @property
    def _client(self) -> Any:
        return self.store.client

    def _open(self) -> None:
        try:
            self.store = TrackingStore(self.record.uri, self.record.run_id)
            with self.store.errors():
                self.run, had = open_mlflow_run(self.store, self.record, self.path)
            self.resumed |= had
        except RefusedError as error:
            if not error.about_schema or self.record.status != "RUNNING" or self.waited:
                raise
            self.waited = True
            time.sleep(SCHEMA_SECONDS)  # another run may be making the store just now
            self._open()
            return
        if self.system_metrics:
            with suppress(Exception):  # a library for a GPU that is not as expected costs no run
                self.monitor = mlflow.system_metrics.system_metrics_monitor.SystemMetricsMonitor(
                    self.record.run_id,
                    SYSTEM_METRICS_SECONDS,
                    resume_logging=self.resumed,
                    tracking_uri=self._client.tracking_uri,
                )
                self.monitor.start()

    def _send_parameters(self) -> None:
        """Log parameters; a resumed run logs what changed as resume.EPOCH.NAME."""
        values = dict(self.record.parameters)
        if self.resumed:
            had, epoch = self._client.get_run(self.record.run_id).data.params, len(self.rows)
            changed = changed_parameters(had, values)
            values = {k: v for k, v in values.items() if k not in had}
            values |= {resumed_name(had, epoch, k): value for k, value in changed.items()}
        params = [Param(key, value) for key, value in values.items()]
        log = partial(self._client.log_batch, self.record.run_id)
        self._send_each("parameters", params, lambda some: log(params=some))
        self.parameters_sent = True

    def _send_dataset(self) -> None:
        datasets = zip(self.record.datasets, ("training", "validation"), strict=False)
        inputs = [dataset_input(*dataset, context) for dataset, context in datasets]
        self._client.log_inputs(self.record.run_id, inputs)
        self.record.dataset_logged = True

    def _send_rows(self) -> None:
        rows = self.rows[self.rows_sent :]
        self._send_metrics(
            [(row, {k: v for k, v in row.items() if k not in ("epoch", "time")}) for row in rows]
        )
        self.rows_sent += len(rows)

    def _send_best(self) -> None:
        """Log metrics of the best epoch so far once more: MLflow sorts runs by last values."""
        epoch = self.record.best_epoch
        rows = [row for row in self.rows if row["epoch"] == epoch]
        if rows and self.best_sent != epoch:
            best = {f"best/{name}": value for name, value in self.record.best.items()}
            self._send_metrics([(rows[0], {"best/epoch": float(epoch), **best})])
            self.best_sent = epoch

    def _send_metrics(self, measured: Sequence[tuple[dict[str, Any], dict[str, float]]]) -> None:
        metrics = [
            Metric(metric_name(name), value, int(row["time"] * 1000), row["epoch"])
            for row, values in measured
            for name, value in values.items()
            if not self._has(name, value, row["epoch"])
        ]
        log = partial(self._client.log_batch, self.record.run_id)
        self._send_each("metrics", metrics, lambda some: log(metrics=some))

    def _has(self, name: str, value: float, epoch: int) -> bool:
        """Whether MLflow has this value already; an epoch that was done again may have another time."""
        if not self.resumed:
            return False
        key = metric_name(name)
        if key not in self.known:
            history = self._client.get_metric_history(self.record.run_id, key)
            self.known[key] = {metric.step: metric.value for metric in history}
        if epoch not in self.known[key]:
            return False
        return name in OF_ITS_EXECUTION or np.array_equal(self.known[key][epoch], value, equal_nan=True)

    def _send_final_tags(self) -> None:
        record, tags = self.record, dict[str, str]()
        if (path := best_checkpoint(self.path.parent)).is_file():
            tags[BEST_CHECKPOINT_TAG] = file_sha256(path)  # links what was exported without MLflow
        if record.note:
            had = self._client.get_run(record.run_id).data.tags.get(NOTE_TAG, "")
            if had in ("", record.note_sent):
                tags[NOTE_TAG] = record.note
        self._client.log_batch(record.run_id, tags=[RunTag(*tag) for tag in tags.items()])
        record.note_sent = tags.get(NOTE_TAG, record.note_sent)

    def _send_file(self, name: str) -> None:
        self.store.check_artifact_folder(self.run.info.artifact_uri)
        path = self.path.parent / name
        if path.is_dir():
            self._client.log_artifacts(self.record.run_id, str(path), path.name)
        elif path.exists():
            self._client.log_artifact(self.record.run_id, str(path))
        else:
            print(f"warning: {path} does not exist any more, and is not in MLflow", flush=True)
        self.record.files.remove(name)

    def _refused(self, kind: str) -> list[str]:
        return self.refused.get(kind, ([], ""))[0]

    def _refuse(self, kind: str, names: list[str], error: RefusedError) -> None:
        self.refused.setdefault(kind, ([], str(error)))[0].extend(names)

    def _attempt(self, kind: str, send: Callable[[], None], name: str = ALL) -> None:
        """Call `send`, unless MLflow refused it before. Raises ConnectionError."""
        if name in self._refused(kind):
            return
        try:
            with self.store.errors():
                send()
        except RefusedError as error:
            self._refuse(kind, [name], error)

    def _send_each(self, kind: str, items: Sequence[Any], send: Callable[[Sequence[Any]], None]) -> None:
        """Send parameters or metrics that MLflow has not refused before."""
        items = [item for item in items if item.key not in self._refused(kind)]
        for key, error in self.store.send_each(items, send):
            self._refuse(kind, [key], error)

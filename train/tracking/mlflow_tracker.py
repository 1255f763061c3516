"""The tracker of a training run in MLflow. Metrics are always written to metrics.jsonl first.

MLflow may be away, slow or broken: a thread sends to it while training continues, and what MLflow missed is
sent later, by the thread or by train/sync.py. tracking.json in the run directory has what to send.
"""

import json
import os
import shlex
import threading
import time
from pathlib import Path
from typing import Any

from serve.contract.command_line import command
from serve.contract.mlflow_tags import runs_page
from serve.contract.urls import is_http, is_remote, redact
from train.config import TrainConfig
from train.tracking.base import MetricsFile
from train.tracking.client import UPLOAD_SECONDS, choose_experiment
from train.tracking.contents import kind_tags
from train.tracking.errors import RefusedError
from train.tracking.run_record import FILE, RUN_TAGS, Record, read_record
from train.tracking.sender import Sender

START_SECONDS = 20.0  # training waits so long for the run's ID, which its checkpoints name
END_SECONDS = 10.0  # and so long at its end; torchrun gives a process that gets SIGTERM 30 s
RETRY_SECONDS = 15.0
LAST_TRIES = 3  # a locked database is free in a moment


class MlflowTracker(MetricsFile):
    """Exactly one MLflow run for a training run, also after a resume (`run_id`, from its checkpoint).

    A copy of a run directory that is resumed is another run. `url` is the directory's, "" for a local one.
    """

    def __init__(self, config: TrainConfig, path: Path, epochs_done: int, run_id: str, url: str = ""):
        super().__init__(path, epochs_done)
        file = path.with_name(FILE)
        record = read_record(file)
        if record is not None and record.is_copy(file):
            print(f"{file.parent} is a copy of {record.folder}: it is another run in MLflow", flush=True)
            record, run_id = None, ""
        if record is None:
            name, experiment_id = choose_experiment(config.experiment)
            record = Record(config.name, name, run_id=run_id, experiment_id=experiment_id)
            record.dataset_logged = bool(run_id)
        elif config.experiment not in ("", record.experiment):
            print(
                f"warning: --experiment {config.experiment} has no effect on a resumed run, which stays in "
                f"{record.experiment or record.experiment_id}",
                flush=True,
            )
        record.folder = url or str(file.parent.resolve())
        self.config, self.record = config, record
        self.record.status, self.record.complete, self.record.ended = "RUNNING", False, 0
        self.sender = Sender(self.record, file, self.rows)
        self.wake, self.tried, self.over = threading.Event(), threading.Event(), threading.Event()
        self.ending = False
        self.thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)

    @property
    def run_id(self) -> str:  # type: ignore[override]
        return self.record.run_id

    def start(self, parameters: dict[str, Any], *datasets: tuple[str, str]) -> None:
        """Wait START_SECONDS at most for the run to be opened.

        `datasets` are (path or URL, digest) of the data for training and of those for validation; the first
        digest is of both together.
        """
        self.record.parameters = {key: str(value) for key, value in parameters.items()}
        self.record.datasets = [(_absolute(source), digest) for source, digest in datasets]
        tags = kind_tags(self.config, parameters, datasets[0][0])
        self.record.tags = tags | self.record.tags | json.loads(os.environ.get(RUN_TAGS, "{}"))
        self.record.save(self.sender.path)
        self.thread.start()
        if not self.tried.wait(START_SECONDS):
            print(f"warning: no answer of MLflow in {START_SECONDS:.0f} s; training begins", flush=True)

    def send(self) -> None:
        self.wake.set()

    def log_best(self, epoch: int, values: dict[str, float]) -> None:
        """Keep the metrics in the record: train/sync.py sends them also of a run that was killed."""
        self.record.best_epoch, self.record.best = epoch, values
        self.record.save(self.sender.path)

    def log_note(self, text: str) -> None:
        """Keep Markdown for the head of the run's page, sent when the run ends."""
        self.record.note = text
        self.record.save(self.sender.path)

    def log_files(self, paths: list[Path]) -> None:
        """Log files to the run's root, folders below their own name."""
        home = self.path.parent.resolve()
        self.record.files += [os.path.relpath(path.resolve(), home) for path in paths]
        self.wake.set()

    def end(self, status: str) -> None:
        """Wait END_SECONDS at most, UPLOAD_SECONDS for files of a finished run while they are being sent.

        `status` is FINISHED, FAILED or KILLED.
        """
        self.record.ended = int(1000 * time.time())
        self.record.status, self.ending = status, True
        self.record.save(self.sender.path)
        self.wake.set()
        deadline = time.monotonic() + UPLOAD_SECONDS
        self.over.wait(END_SECONDS)
        while status == "FINISHED" and self.sender.uploading and time.monotonic() < deadline:
            self.over.wait(1)
        self.over.wait(1 if status == "FINISHED" else 0)
        if not self.record.complete:
            print(
                f"warning: MLflow does not have all of this run; metrics are in {self.path}, and\n"
                f"{command('train/sync.py')} {self.path.parent} sends the rest",
                flush=True,
            )
        elif is_http(self.record.uri):
            page = runs_page(self.record.uri, self.sender.run.info.experiment_id)
            print(f"compare runs in MLflow: {page}", flush=True)
        elif not self.record.uri.startswith("databricks"):
            look = f"mlflow ui --backend-store-uri {shlex.quote(redact(self.record.uri))}"
            print(f"compare runs in MLflow: {look}", flush=True)

    def _send_all(self) -> None:
        behind, tries_left, reported = False, LAST_TRIES, 0
        while True:
            try:
                self.sender.update()
                if behind:
                    print("MLflow answers again, and has what it missed", flush=True)
                behind = False
            except RefusedError as error:
                print(f"warning: this run is not in MLflow: {error}", flush=True)
                break
            except Exception as error:  # a thread that died would send nothing, in silence
                if not behind:
                    print(f"warning: {redact(error)}; what MLflow misses is sent later", flush=True)
                behind = True
            for refusal in self.sender.refusals[reported:]:
                print(f"warning: MLflow refuses {refusal}", flush=True)
            reported = len(self.sender.refusals)
            self.tried.set()
            if self.ending:
                tries_left -= 1
                if self.sender.done or not tries_left:
                    break
                time.sleep(1)
                continue
            self.wake.wait(RETRY_SECONDS if behind else None)
            self.wake.clear()
        self.tried.set()
        self.over.set()


def _absolute(source: str) -> str:
    return source if is_remote(source) else str(Path(source).resolve())

"""tracking.json of a run directory: what MLflow should have of the run, apart from its metrics."""

import json
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from serve.contract.files import atomic_write

FILE = "tracking.json"
RUN_TAGS = "PUREBRED_RUN_TAGS"  # environment variable with a run's own tags, as JSON
SAVING = threading.Lock()  # the training thread's and MLflow's


@dataclass
class Record:
    """Kept from the start of a run, whether MLflow answers or not."""

    name: str
    experiment: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """A tag by which the run is found again when the answer with its ID was lost."""
    uri: str = ""
    """Of the store, without a password and with an absolute path: other commands find it by this."""
    experiment_id: str = ""
    """In place of a name, where MLFLOW_EXPERIMENT_ID is all that is given."""
    tags: dict[str, str] = field(default_factory=dict)
    run_id: str = ""
    requested: bool = False
    """A request to make the run was sent, and may have been fulfilled."""
    parameters: dict[str, str] = field(default_factory=dict)
    datasets: list[tuple[str, str]] = field(default_factory=list)
    """(absolute path or URL, digest) for training and for validation."""
    dataset_logged: bool = False
    best_epoch: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Metrics of that epoch."""
    note: str = ""
    """Markdown."""
    note_sent: str = ""
    """A note that MLflow has otherwise is somebody's own, and stays."""
    files: list[str] = field(default_factory=list)
    """Files and folders that are still to be logged, relative to the run directory."""
    folder: str = ""
    """Absolute path of the run directory, or the URL where it is kept."""
    started: int = field(default_factory=lambda: int(1000 * time.time()))
    """Milliseconds since 1970."""
    ended: int = 0
    """0 while it is trained, and when its processes were lost."""
    status: str = "RUNNING"
    complete: bool = False
    """MLflow has all of it, the final status too."""

    def save(self, path: Path) -> None:
        """Write the file. A full disk, of which metrics.jsonl's own warning tells, stops nothing."""
        with SAVING, suppress(OSError), atomic_write(path, "w") as file:
            file.write(json.dumps(asdict(self), indent=1))

    def is_copy(self, path: Path) -> bool:
        """Return whether the run directory with this file is a copy of another one that is still there; one
        that was moved is the same run."""
        original = Path(self.folder, FILE)
        other = read_record(original) if self.folder else None
        return other is not None and other.key == self.key and not original.samefile(path)


def read_record(path: Path) -> Record | None:
    """Return None if there is no file, or none that can be read."""
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def child_environment(parent: str, tags: dict[str, str]) -> dict[str, str]:
    """Return variables by which a training process's run becomes a child of the run `parent`, with these
    tags; MLFLOW_RUN_ID, by which all of them would be one run, is emptied."""
    own = {**tags, "mlflow.parentRunId": parent} if parent else tags
    return {RUN_TAGS: json.dumps(own), "MLFLOW_RUN_ID": ""}

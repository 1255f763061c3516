"""tracking.json of a run directory: what MLflow should have of the run, but for its metrics."""

import json
import threading
import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from serve.contract.files import atomic_write

SAVING = threading.Lock()


@dataclass
class Record:
    """Kept in tracking.json from the start of a run, whether MLflow answers or not."""

    name: str
    experiment: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """A tag by which the run is found again when its ID never reached us."""
    uri: str = ""
    """Of the store, without a password and with an absolute path: other commands find it by this."""
    experiment_id: str = ""
    """In place of a name, where MLFLOW_EXPERIMENT_ID is all that is given."""
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
        with SAVING, atomic_write(path, "w") as file:  # training's thread and MLflow's
            file.write(json.dumps(asdict(self), indent=1))


def read_record(path: Path) -> Record | None:
    """None if there is none, or none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(Record)}  # a later version may have added some
        return Record(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None

"""What MLflow gets of a training run: parameters, metrics, tags, the data set and artifacts."""

import hashlib
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from serve.contract.mlflow_tags import CLASSES_TAG, DATA_TAG, HOST_TAG, KIND_TAG, MODEL_NAME_TAG
from serve.contract.urls import is_remote, last_part
from train.checkpoint import best_checkpoint
from train.config import SETTINGS, TrainConfig

KEY_TAG = "purebred.key"
NOTE_TAG = "mlflow.note.content"  # Markdown at the head of a run's page
# they differ when an epoch is repeated; the first ones stay
OF_ITS_EXECUTION = ("images_per_second", "data_share")
RESUMED = re.compile(r"resume\.(\d+)(?:-(\d+))?\.(.+)")
LONGEST_METRIC_NAME = 240  # MLflow takes 250, and a hash may follow
FILES = (
    "config.yaml",
    "metrics.jsonl",
    "bad_files.csv",
    "val_predictions.csv",
    "val_predictions.npz",
    "report.html",
    "figures",
    "duplicates.csv",
    "per_class.csv",
    "confusion_pairs.csv",
)


def sources_of(given: TrainConfig, config: TrainConfig) -> tuple[str, str]:
    """Return where training and validation images are from, as the user gave it: `config` has the copies of
    URLs, and of a folder of parts those parts."""
    data = given.data or config.data
    return data, given.val_data or (data if is_remote(data) else config.val_data or data)


def changed_parameters(known: Mapping[str, str], values: Mapping[str, str]) -> dict[str, str]:
    """Return those of a resumed run's parameters that MLflow has otherwise, as last changed."""
    last = dict(known)
    resumed = [(match, value) for key, value in known.items() if (match := RESUMED.fullmatch(key))]
    for match, value in sorted(resumed, key=lambda item: (int(item[0][1]), int(item[0][2] or 1))):
        last[match[3]] = value
    return {
        key: value
        for key, value in values.items()
        if last.get(key, value) != value
        and key != "experiment"  # a run stays in its own
        and not (key in SETTINGS and SETTINGS[key].location)
    }


def resumed_name(known: Iterable[str], epoch: int, name: str) -> str:
    """Return a free name for a changed parameter, as MLflow keeps the first value: resume.6.epochs, or
    resume.6-2.epochs if that is taken."""
    key, number = f"resume.{epoch}.{name}", 1
    while key in known:
        number += 1
        key = f"resume.{epoch}-{number}.{name}"
    return key


def metric_name(name: str) -> str:
    """Return a name that MLflow takes: class names can hold characters that it refuses, or look like paths.
    A changed name ends with a hash of the original, so that different names stay different."""
    parts = re.sub(r"[^/\w.\- :]", "_", name)[:LONGEST_METRIC_NAME].split("/")
    usable = "/".join("_" * max(1, len(part)) if part in ("", ".", "..") else part for part in parts)
    if usable == name:
        return name
    return f"{usable}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def kind_tags(config: TrainConfig, parameters: Mapping[str, Any], data_source: str) -> dict[str, str]:
    """Return tags that distinguish runs in a table; a trial of a sweep gets its kind from there."""
    tags = {
        KIND_TAG: "fold" if config.folds else "training",
        MODEL_NAME_TAG: config.model,
        CLASSES_TAG: str(parameters.get("num_classes", "")),
        DATA_TAG: last_part(data_source),
        HOST_TAG: socket.gethostname(),
    }
    return {name: value for name, value in tags.items() if value}


def artifacts(folder: Path) -> list[Path]:
    """Files and folders of a finished run."""
    paths = [*(folder / name for name in FILES), best_checkpoint(folder)]
    return [path for path in paths if path.exists()]

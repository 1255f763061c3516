"""Listing of a folder for its layouts: folders that may be classes, and files that are no images."""

import os
import shlex
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from serve.contract.archive import SUFFIX
from serve.contract.formats import count_by_name
from serve.contract.listing import has_image_suffix, system_folder
from serve.contract.packed import describe_packed, packed_by_name
from train.data.labels import listed

RUN_FILES = ("checkpoints", "metrics.jsonl", "figures")
REPORTS = {
    "curves.png": "comparison.csv",
    "label_issues.png": "label_issues.csv",
    "history.png": "study.csv",
    "importance.png": "study.csv",
}
"""Figure of a command -> the table beside it."""
MLFLOW_FOLDERS = ("mlruns", "mlartifacts")


class ClassFolders(NamedTuple):
    """Folders directly in a data set."""

    names: list[str]
    """Sorted, of those that may be classes."""
    outputs: list[str]
    """Of those that hold output of this program."""
    hidden: list[str]
    """Of those that may be classes, but for the dot before their names."""
    system: Counter[str]
    """How many system folders have which name."""


def class_folders(root: Path) -> ClassFolders:
    found = ClassFolders([], [], [], Counter())
    for name in sorted(os.listdir(root)):
        if not os.path.isdir(root / name):
            continue
        if system_folder(f"{name}/") or os.path.isfile(root / name / "pyvenv.cfg"):  # Python's environments
            found.system[name] += 1
        elif may_be_hidden_class(name):
            found.hidden.append(name)
        elif not name.startswith("."):
            (found.outputs if is_output(root / name) else found.names).append(name)
    return found


def is_report(image: Path) -> bool:
    return image.name in REPORTS and os.path.isfile(image.with_name(REPORTS[image.name]))


def is_output(folder: Path) -> bool:
    """Return whether it is a run directory or one that MLflow writes to, or holds some or the drawn sample.

    A folder with any other image directly in it is none.
    """
    try:
        names = os.listdir(folder)
    except OSError:  # reading its images reports it
        return False
    if any(has_image_suffix(name) and not is_report(folder / name) for name in names):
        return False
    if folder.name in MLFLOW_FOLDERS or any(is_report(folder / name) for name in names):
        return True
    if (folder / "sample" / "test_labels.csv").is_file() or any((folder / ".cache").glob("scan-*.json")):
        return True
    configs = (config for pattern in ("", "*/", "*/*/") for config in folder.glob(f"{pattern}config.yaml"))
    return any(os.path.exists(config.parent / name) for config in configs for name in RUN_FILES)


def may_be_hidden_class(name: str) -> bool:
    """Return whether a folder is hidden for its name, as .50 BMG is, and not for a system."""
    return name.startswith(".") and not name.startswith("..") and not system_folder(f"{name}/")


def packed_beside(folder: Path, read: str) -> list[str]:
    """Return a line about archives in the folder, which are not read beside what is read, if any."""
    tars = read != "tar files"
    names = [
        name
        for name in sorted(os.listdir(folder))
        if (packed_by_name(name) or (tars and name.lower().endswith(SUFFIX)))
        and os.path.isfile(folder / name)
    ]
    if not names:
        return []
    path = str(folder / names[0])
    packed = packed_by_name(names[0])
    cure = describe_packed(packed, path) if packed else f"a tar file: tar -xf {shlex.quote(path)}"
    return [f"{len(names)} files beside the {read} are not read; {names[0]!r} is {cure}"]


def describe_left_out(found: ClassFolders) -> list[str]:
    """Return lines about folders that are left out, if any."""
    lines = [f"output of this program left out ({listed(found.outputs)})"] if found.outputs else []
    lines += describe_hidden(found.hidden)
    if found.system:
        lines.append(f"{found.system.total()} system folders left out ({count_by_name(found.system)})")
    return lines


def describe_hidden(names: Collection[str]) -> list[str]:
    line = f"hidden folders left out ({listed(names)}): a class needs a name without a dot before it"
    return [line] if names else []

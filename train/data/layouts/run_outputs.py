"""Files that this program writes, known by their content where a data set is expected."""

import os
from pathlib import Path

from serve.contract.listing import has_image_suffix

RUN_FILES = ("checkpoints", "metrics.jsonl", "figures")
REPORTS = {
    "curves.png": "comparison.csv",
    "label_issues.png": "label_issues.csv",
    "history.png": "study.csv",
    "importance.png": "study.csv",
}
"""Figure of a command -> the table beside it."""
MLFLOW_FOLDERS = ("mlruns", "mlartifacts")


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

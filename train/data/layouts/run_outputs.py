"""Files that this program writes, known by their content where a data set is expected."""

import os
from functools import cache
from pathlib import Path

RUN_FILES = ("checkpoints", "metrics.jsonl", "figures")
REPORTS = {
    "curves.png": "comparison.csv",
    "label_issues.png": "label_issues.csv",
    "history.png": "study.csv",
    "importance.png": "study.csv",
}
"""Figure of a command -> the table beside it."""
MLFLOW_FOLDERS = ("mlruns", "mlartifacts")


def without_outputs(root: Path, paths: dict[str, list[str]]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the paths below each folder without figures of runs, artifacts of MLflow and the drawn sample,
    and the names of the folders that hold such output."""

    @cache
    def is_figures_or_sample(folder: str, below: str) -> bool:
        if below == "figures":
            return os.path.isfile(root / folder / "config.yaml")
        return Path(folder).name == "sample" and os.path.isfile(root / folder / "test_labels.csv")

    def is_written(path: str) -> bool:
        *parents, name = path.split("/")
        if parents[0] in MLFLOW_FOLDERS or (name in REPORTS and is_report(root / path)):
            return True
        return any(
            parent in ("figures", "train", "test") and is_figures_or_sample("/".join(parents[:i]), parent)
            for i, parent in enumerate(parents)
        )

    kept = {name: [p for p in below if not is_written(f"{name}/{p}")] for name, below in paths.items()}
    if not any(kept.values()) and "sample" in paths:  # nothing else is there, so it is meant
        kept = paths
    outputs = [name for name in paths if len(kept[name]) < len(paths[name])]
    return kept, outputs + [name for name in paths if not paths[name] and is_output(root / name)]


def is_report(image: Path) -> bool:
    return image.name in REPORTS and os.path.isfile(image.with_name(REPORTS[image.name]))


def is_output(folder: Path) -> bool:
    """Return whether `folder` is a run directory, holds some, or is one that MLflow writes to."""
    if folder.name in MLFLOW_FOLDERS or any(is_report(folder / name) for name in REPORTS):
        return True
    if any((folder / ".cache").glob("scan-*.json")):
        return True
    configs = (config for pattern in ("", "*/", "*/*/") for config in folder.glob(f"{pattern}config.yaml"))
    return any(os.path.exists(config.parent / name) for config in configs for name in RUN_FILES)

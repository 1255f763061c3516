"""What this program writes, recognised by its content where a data set is expected: it is none of that."""

import os
import re
from functools import cache
from pathlib import Path

from train.checkpoint import CHECKPOINTS
from train.data.tree import Tree

RUN_FILES = (CHECKPOINTS, "metrics.jsonl", "figures")
REPORTS = {
    "curves.png": "comparison.csv",
    "label_issues.png": "label_issues.csv",
    "history.png": "study.csv",
    "importance.png": "study.csv",
}
"""Figures of train/compare.py, label_issues.py and sweep.py, and what is written beside each."""
ARTIFACT = re.compile(r"(?:^|/)\d+/(?:[0-9a-f]{32}|models/m-[0-9a-f]{32})/artifacts/")
"""Of an MLflow server: EXPERIMENT/RUN/artifacts/."""


def without_outputs(root: Path, tree: Tree) -> tuple[Tree, list[str]]:
    """(without figures of runs, artifacts of MLflow and the drawn sample; the folders that have some)"""

    @cache
    def holds_output(folder: str, kind: str) -> bool:
        if kind == "figures":
            return os.path.isfile(root / folder / "config.yaml")
        return Path(folder).name == "sample" and os.path.isfile(root / folder / "test_labels.csv")

    def written(path: str) -> bool:
        *parts, name = path.split("/")
        if ARTIFACT.search(path) or (name in REPORTS and is_report(root / path)):  # a Path only if needed
            return True
        return any(
            part in ("figures", "train", "test") and holds_output("/".join(parts[:i]), part)
            for i, part in enumerate(parts)
        )

    kept = {name: [p for p in paths if not written(f"{name}/{p}")] for name, paths in tree.items()}
    if not any(kept.values()) and "sample" in tree:  # it alone is there, so it was meant
        kept = tree
    outputs = [name for name in tree if len(kept[name]) < len(tree[name])]
    outputs += [name for name in tree if not tree[name] and is_output(root / name)]
    return kept, outputs


def is_report(image: Path) -> bool:
    return image.name in REPORTS and os.path.isfile(image.with_name(REPORTS[image.name]))


def is_output(folder: Path) -> bool:
    """Whether it is a run directory, holds some, or is what MLflow writes to."""
    if folder.name in ("mlruns", "mlartifacts") or any(is_report(folder / name) for name in REPORTS):
        return True
    if next((folder / ".cache").glob("scan-*.json"), None):
        return True
    configs = (config for pattern in ("", "*/", "*/*/") for config in folder.glob(f"{pattern}config.yaml"))
    return any(os.path.exists(config.parent / name) for config in configs for name in RUN_FILES)

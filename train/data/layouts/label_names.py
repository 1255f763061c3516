"""Names of numbered classes, in a JSON file beside a label file: {"0": "healthy"} or {"healthy": 0}."""

import json
from collections.abc import Collection
from pathlib import Path

from serve.contract.errors import UserError

MOST_BYTES = 1 << 20


def read_class_names(
    label_file: Path, labels: Collection[str], exactly: bool
) -> tuple[dict[str, str], str]:
    """Return number -> name and the file that has them; ({}, "") if labels are no numbers or none has.

    A file is used if its numbers are the labels, or if they are among them, unless `exactly`. Raises
    UserError when two files name the classes differently.
    """
    numbers = {label.strip() for label in labels}
    found: dict[str, dict[str, str]] = {}
    for file in sorted(label_file.parent.glob("*.json")) if all(map(str.isdecimal, numbers)) else ():
        names = _names(file)
        if names and (numbers == names.keys() or (not exactly and numbers <= names.keys())):
            found[file.name] = names
    one, names = next(iter(found.items()), ("", {}))
    if other := next((file for file in found if found[file] != names), ""):
        raise UserError(
            f"{label_file.parent / one} and {other} give the classes of {label_file.name} different names: "
            "move one of them elsewhere"
        )
    return names, one


def _names(file: Path) -> dict[str, str]:
    """Return number -> name; {} if the file holds anything else."""
    try:
        content = json.loads(file.read_text("utf-8-sig")) if file.stat().st_size <= MOST_BYTES else None
    except (OSError, ValueError):
        return {}
    pairs = list(content.items()) if isinstance(content, dict) else []
    if all(isinstance(number, int) and not isinstance(number, bool) for _, number in pairs):
        pairs = [(str(number), name) for name, number in pairs]
    names = {number.strip(): name for number, name in pairs if isinstance(name, str) and name.strip()}
    whole = len(names) == len(pairs) == len(set(names.values()))
    return names if whole and all(map(str.isdecimal, names)) else {}

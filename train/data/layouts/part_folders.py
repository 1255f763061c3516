"""Folders that are the parts of a data set: train/ is trained on, and val/ (or else test/) validates."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from serve.contract.errors import UserError
from train.config import TrainConfig
from train.data.labels import listed, normal
from train.data.layouts.flat import flat_images
from train.data.layouts.listing import class_folders
from train.data.layouts.parts import split_name
from train.data.layouts.registry import contradicts, find_labels, label_files, unused_label_file


def take_parts(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Return settings whose `data` and `val_data` are the parts of the folder that --data names, and notes.

    Settings stay as they are where the folder holds no parts, or where which part is for what is not
    certain: two training parts, or two to validate on. The layout then refuses it, or takes classes.

    Raises:
        UserError: a part to validate on has other classes or no labels, or --val-data or --folds say
            otherwise; the message holds the flags to give.
    """
    root = _unwrap(Path(config.data)) if config.data and config.data_format != "csv" else None
    found = _find_parts(root, config.data_format) if root and root.is_dir() else None
    if root is None or found is None:
        return config, []
    train, parts, others, warnings = found
    chosen = _validation_part(root, train, parts)
    resumed = config.resume not in ("", "auto")  # its val_data is this part, or where that was before
    if chosen and not resumed and (config.val_data or config.folds):
        flag = (
            f"--val-data {shlex.quote(config.val_data)}" if config.val_data else f"--folds {config.folds}"
        )
        raise UserError(
            f"--data {config.data} holds a part to validate on, {chosen.name!r}: give "
            f"--data {shlex.quote(str(train.path))} {flag}, or leave {flag} out"
        )
    val_data = str(chosen.path) if chosen else config.val_data
    how = f"{chosen.name!r} validates" if chosen else f"{val_data or 'a share of it'} validates"
    unused = listed([part.name for part in parts if part is not chosen])
    note = f"{root}: {train.name!r} is trained on, {how}" + (f"; {unused} is not used" if unused else "")
    notes = [note, *(f"warning: {root}: {warning}" for warning in warnings)]
    if others:
        notes.append(f"warning: {root}: {listed(others)} beside the parts is not used")
    return config.replace(data=str(train.path), val_data=val_data), notes


class _Part(NamedTuple):
    name: str
    path: Path
    """Of the folder that holds its classes."""
    classes: frozenset[str]
    """Empty: it cannot be read as labelled images."""
    problem: str
    """Why not."""
    labels: dict[str, str]
    """By paths relative to `path`."""


def _find_parts(root: Path, data_format: str) -> tuple[_Part, list[_Part], list[str], list[str]] | None:
    """Return (training part, other parts, names of other folders, warnings); None where it holds no parts,
    or a label file that gives their images other classes."""
    names = class_folders(root).names
    training = [name for name in names if split_name(name)[0] == "train"]
    if len(training) != 1:
        return None
    rest = split_name(training[0])[1]
    same = [n for n in names if n != training[0] and split_name(n)[0] and split_name(n)[1] == rest]
    if not same or flat_images(root).paths:
        return None
    train = _read_part(root, training[0], data_format, "--data")
    parts = [_read_part(root, name, data_format, "--val-data") for name in same]
    others = [name for name in names if name not in (*same, *training)]
    certain = not others or any(len(part.classes & train.classes) > 1 for part in parts)
    if not certain or len(train.classes) < 2:
        return None
    usable, doubtful = label_files(root, "--data")
    below = train.path.relative_to(root)
    own = {str(below / path): label for path, label in train.labels.items()}
    if any(contradicts(labels, own) for labels in usable.values()):
        return None
    return train, parts, others, unused_label_file(doubtful)


def _read_part(root: Path, name: str, data_format: str, flag: str) -> _Part:
    path = _unwrap(root / name)
    try:
        labels = find_labels(path, data_format, flag).labels
    except UserError as error:
        return _Part(name, path, frozenset(), str(error), {})
    return _Part(name, path, frozenset(map(normal, labels.values())), "", labels)


def _unwrap(folder: Path) -> Path:
    """Return the first folder that holds something else than one folder: seg_train/seg_train."""
    while folder.is_dir() and len(names := class_folders(folder).names) == 1:
        inside = folder / names[0]
        if flat_images(folder).paths or not class_folders(inside).names:
            break
        folder = inside
    return folder


def _validation_part(root: Path, train: _Part, parts: Sequence[_Part]) -> _Part | None:
    """Return the part to validate on; None without one. Raises UserError when it has no such classes."""
    kinds = [[part for part in parts if split_name(part.name)[0] == kind] for kind in ("val", "test")]
    validation, tests = kinds[0], [part for part in kinds[1] if part.classes & train.classes]
    candidates = validation or tests
    split = f"--data {shlex.quote(str(train.path))}"
    if len(candidates) > 1:
        names = listed([part.name for part in candidates])
        raise UserError(
            f"{root} holds several parts to validate on ({names}): name one of them, as in {split} "
            f"--val-data {shlex.quote(str(candidates[0].path))}"
        )
    if not candidates:
        return None
    part = candidates[0]
    if len(part.classes) > 1 and part.classes <= train.classes:
        return part
    names = listed(sorted(part.classes, key=lambda name: (name in train.classes, name)), 3)
    reason = part.problem or f"its classes, {names}, must be two or more of those of {train.name!r}"
    raise UserError(
        f"{str(root / part.name)!r} cannot validate what is trained on {train.name!r}: {reason}. Sort its "
        "images into a folder for each class or name them in a label file for --val-data, or leave it out "
        f"and validate on a share of the training images: {split}"
    )

"""Layouts of a labelled data set. A new one is a module named in LAYOUTS.

Its `matches` says whether a file or folder looks like it. Its `read` returns images and labels, and raises
UserError when labels are missing or ambiguous, OSError when a file cannot be read; `flag`, --data or
--val-data, is for messages.
"""

import csv
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from serve.contract.archive import SUFFIX
from serve.contract.errors import UserError
from serve.contract.formats import ARRAYS, describe_ignored
from serve.contract.listing import has_image_suffix
from serve.contract.packed import look_into
from train.data.labels import LabelledPaths, RowsError
from train.data.layouts import flat, folders, label_file, tar_files
from train.data.layouts.label_candidates import ColumnsError
from train.data.layouts.listing import (
    class_folders,
    describe_left_out,
)

LABEL_FILES = (".csv", ".tsv", ".jsonl")
MOST_LABEL_FILES = 20


class DataLayout(Protocol):
    def matches(self, source: Path) -> bool: ...
    def read(self, source: Path, flag: str) -> LabelledPaths: ...


LAYOUTS: dict[str, DataLayout] = {"csv": label_file, "flat": flat, "folders": folders, "tar": tar_files}
"""Layouts by the value of --data-format; the first one that matches is taken."""


def find_labels(source: Path, data_format: str, flag: str = "--data", columns: str = "") -> LabelledPaths:
    """Return the images of `source` and their labels, in the layout `data_format` or, if "auto", any.

    `columns` is the value of --columns, for a label file. Raises UserError when `source` cannot be read,
    holds no images, or could be of two layouts.
    """
    if not source.exists():
        raise UserError(
            f"{flag} {str(source)!r} does not exist; name a folder of images or a label file (CSV)"
        )
    try:
        if source.is_file() and ARRAYS.fullmatch(source.suffix.lower()):
            raise UserError(
                f"{flag} {source} holds arrays: write its images as files, named in a label file (CSV)"
            )
        if source.is_file() and source.suffix != SUFFIX and (packed := look_into(source)):
            raise UserError(f"{flag} {source} is {packed}")
        if source.is_file() and has_image_suffix(source.name):
            raise UserError(f"{flag} {source} is one image: name its folder or a label file (CSV)")
        if data_format == "csv" or (data_format == "auto" and label_file.matches(source)):
            found = label_file.read(source, flag, columns)
        elif data_format == "auto":
            found = _read_folder(source, flag)
        else:
            found = LAYOUTS[data_format].read(source, flag)
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        culprit = getattr(error, "filename", None) or source  # None where a read fails, not an open
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{culprit} cannot be read as --data-format {data_format}: {reason}") from error
    if not found.labels:
        raise UserError("; ".join([f"no images in {source}", found.layout, *found.warnings]))
    return found


def _read_folder(source: Path, flag: str) -> LabelledPaths:
    """Return what the layout that matches reads.

    Raises UserError when none does, or a label file in the folder gives its images other classes.
    """
    problem, name = "", ""
    found: LabelledPaths | None = None
    try:
        name = recognise(source)
        found = LAYOUTS[name].read(source, flag)
    except UserError as error:
        problem = str(error)
    usable, doubtful = label_files(source, flag) if name != "tar" and source.is_dir() else ({}, "")
    files = [file for file, labels in usable.items() if not found or contradicts(labels, found.labels)]
    flags = " or ".join(f"{flag} {shlex.quote(str(file))}" for file in files)
    if found and not flags:
        return replace(found, warnings=[*found.warnings, *unused_label_file(doubtful)])
    if found:
        raise UserError(
            f"{source} holds a label file that gives its images other classes than their "
            f"{'names' if name == 'flat' else 'folders'} do: give {flags}, or --data-format {name}"
        )
    if flags:
        raise UserError(f"{source} holds a label file: give {flags}. Without it: {problem}")
    raise UserError(f"{doubtful}. Without this label file: {problem}" if doubtful else problem)


def unused_label_file(doubtful: str) -> list[str]:
    """Return a warning, if there is a label file that cannot be used as it is: `doubtful` says why."""
    return [f"a label file in it is not used; to use it {doubtful}"] if doubtful else []


def label_files(folder: Path, flag: str) -> tuple[dict[Path, dict[str, str]], str]:
    """Return label files directly in the folder -> image -> label, and why one cannot be used as it is."""
    usable: dict[Path, dict[str, str]] = {}
    doubtful = ""
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(LABEL_FILES))
    for file in [folder / name for name in names[:MOST_LABEL_FILES]]:
        try:
            labels = label_file.read(file, flag).labels
        except ColumnsError as error:
            doubtful = doubtful or f"give {flag} {shlex.quote(str(file))}: {error}"
        except RowsError as error:
            doubtful = doubtful or f"give {flag} {shlex.quote(str(file))} once it is corrected: {error}"
        except (UserError, OSError, csv.Error, UnicodeDecodeError):
            continue
        else:
            if len(set(labels.values())) > 1:
                usable[file] = labels
    return usable, doubtful


def contradicts(labels: dict[str, str], others: dict[str, str]) -> bool:
    """Return whether images of one class in `others` have several labels."""
    pairs = {(others[path], label) for path, label in labels.items() if path in others}
    return len(pairs) > len({name for name, _ in pairs})


def recognise(source: Path) -> str:
    """Return the name of the layout that matches. Raises UserError when none does, or two do."""
    found = [name for name, layout in LAYOUTS.items() if layout.matches(source)]
    if {"flat", "folders"} <= set(found):
        image, folder = flat.flat_images(source).paths[0], class_folders(source).names[0]
        raise UserError(
            f"{source} holds both images ({image!r}, ...) and folders ({folder!r}, ...): give "
            "--data-format flat or --data-format folders"
        )
    if found:
        return found[0]
    ignored = describe_ignored(flat.flat_images(source).ignored)
    left_out = describe_left_out(class_folders(source))
    lines = ["no images, no class folders and no tar files", *left_out, *ignored]
    raise UserError(f"{source} holds {'; '.join(lines)}")

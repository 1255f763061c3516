"""Layouts of a labelled data set. A new one is a module with `matches` and `read`, named in LAYOUTS."""

import csv
from pathlib import Path
from typing import Protocol

from serve.contract.archive import SUFFIX
from serve.contract.errors import UserError
from serve.contract.packed import look_into
from train.data.labels import LabelledPaths
from train.data.layouts import flat, folders, label_file, tar_files
from train.data.layouts.listing import class_folders, describe_ignored, describe_left_out


class DataLayout(Protocol):
    def matches(self, source: Path) -> bool:
        """Return whether `source`, a file or a folder, looks like a data set of this layout."""

    def read(self, source: Path, flag: str) -> LabelledPaths:
        """Return images and labels; `flag`, --data or --val-data, is for messages.

        Raises UserError when labels are missing or ambiguous, OSError when a file cannot be read.
        """


LAYOUTS: dict[str, DataLayout] = {"csv": label_file, "flat": flat, "folders": folders, "tar": tar_files}
"""Layouts by the value of --data-format; the first one that matches is taken."""


def find_labels(source: Path, data_format: str, flag: str = "--data") -> LabelledPaths:
    """Return the images of `source` and their labels, in the layout `data_format` or, if "auto", any.

    Raises UserError when `source` cannot be read, holds no images, or could be of two layouts.
    """
    if not source.exists():
        raise UserError(
            f"{flag} {str(source)!r} does not exist; name a folder of images or a label file (CSV)"
        )
    try:
        if source.is_file() and source.suffix != SUFFIX and (packed := look_into(source)):
            raise UserError(f"{flag} {source} is {packed}")
        name = recognise(source) if data_format == "auto" else data_format
        found = LAYOUTS[name].read(source, flag)
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        culprit, reason = getattr(error, "filename", source), getattr(error, "strerror", error)
        raise UserError(f"{culprit} cannot be read as --data-format {data_format}: {reason}") from error
    if not found.labels:
        raise UserError("; ".join([f"no images in {source}", found.layout, *found.warnings]))
    return found


def recognise(source: Path) -> str:
    """Return the name of the layout that matches. Raises UserError when none does, or two do."""
    found = [name for name, layout in LAYOUTS.items() if layout.matches(source)]
    if {"flat", "folders"} <= set(found):
        image, folder = flat.flat_images(source).paths[0], class_folders(source)[0][0]
        raise UserError(
            f"{source} holds both images ({image!r}, ...) and folders ({folder!r}, ...): give "
            "--data-format flat or --data-format folders"
        )
    if found:
        return found[0]
    outputs, system = class_folders(source)
    ignored = describe_ignored(flat.flat_images(source).ignored)
    lines = ["no images, no class folders and no tar files", *describe_left_out(outputs, system), *ignored]
    raise UserError(f"{source} holds {'; '.join(lines)}")

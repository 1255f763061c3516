"""Layout "flat": images in one folder, each with its label in its name, as in cat.0.jpg."""

import os
import re
from pathlib import Path

from serve.contract.errors import UserError
from serve.contract.listing import Listing, list_images
from train.data.labels import LabelledPaths
from train.data.layouts.listing import class_folders, describe_ignored, describe_left_out
from train.data.layouts.run_outputs import is_report

NAME = re.compile(r"^(?P<label>.*[^\s._-])[\s._-]+\(?\d+\)?$", re.DOTALL)


def matches(source: Path) -> bool:
    return source.is_dir() and bool(flat_images(source).paths)


def read(source: Path, flag: str) -> LabelledPaths:
    """Return the images directly in `source`. Raises UserError when a file name holds no label."""
    listing = flat_images(source)
    labels = {path: label_of(path) for path in listing.paths}
    for path, label in labels.items():
        if not label:
            raise UserError(
                f"no label in the file name {path!r} in {source}: expected label.number.suffix as in "
                "cat.0.jpg; use a folder for each class or a label file (CSV with the columns path,label)"
            )
    facts = describe_left_out([], class_folders(source)[1])
    layout = "; ".join(["labels in the file names (label.number.suffix)", *facts])
    return LabelledPaths(source, labels, layout, describe_ignored(listing.ignored))


def label_of(name: str) -> str:
    """Return what a file name has before its running number: big_dog_12.jpg -> big_dog; "" without one."""
    match = NAME.match(os.path.splitext(name)[0])
    return match["label"] if match else ""


def flat_images(source: Path) -> Listing:
    """List the images directly in `source` without hidden files and figures that this program wrote."""
    listing = list_images(source, recursive=False)
    listing.paths[:] = [p for p in listing.paths if not p.startswith(".") and not is_report(source / p)]
    return listing

"""Layout "flat": images in one folder, each with its label in its name, as in cat.0.jpg."""

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from serve.contract.errors import UserError
from serve.contract.formats import describe_ignored
from serve.contract.image_files import PART, USUAL, words
from serve.contract.listing import Listing, list_images
from train.data.labels import LabelledPaths, listed
from train.data.layouts.listing import class_folders, describe_left_out, is_report

NAME = re.compile(r"^(?P<label>.*[^\s._-])[\s._-]+\(?\d+\)?$", re.DOTALL)
COPY = re.compile(r"(?:\s\(?\d+\)?|\s+(?:-\s+)?(?:copy|kopie|copie|copia)(?:\s\(?\d+\)?)?)$", re.IGNORECASE)
"""cat.0 (1), cat.0 2, cat.0 - Copy (2): what browsers, Macs and Windows call a copy of cat.0."""
SHORTEST_ID = 3  # digits
NAMELESS = USUAL | {"photo", "picture", "dsc", "dscn", "dscf", "pxl", "frame"}
"""Words that cameras and data sets number all their images by."""


def matches(source: Path) -> bool:
    return source.is_dir() and bool(flat_images(source).paths)


def read(source: Path, flag: str) -> LabelledPaths:
    """Return the images directly in `source`. Raises UserError when a file name holds no label."""
    listing = flat_images(source)
    labels, warnings = labels_of(listing.paths)
    for path, label in labels.items():
        if not label:
            raise UserError(
                f"no label in the file name {path!r} in {source}: expected label.number.suffix as in "
                "cat.0.jpg; use a folder for each class or a label file (CSV with the columns path,label)"
            )
    facts = describe_left_out(class_folders(source))
    layout = "; ".join(["labels in the file names (label.number.suffix)", *facts])
    return LabelledPaths(source, labels, layout, warnings + describe_ignored(listing.ignored))


def labels_of(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return file name -> label, "" without one, and warnings about labels that may be none.

    Copies of a file that a browser or a system has numbered (cat.0 (1).jpg) have the label of the original.
    """
    stems = {name: os.path.splitext(name)[0] for name in names}
    known = {stem for stem in stems.values() if NAME.match(stem)}
    originals = {name: _original(stem, known) for name, stem in stems.items()}
    labels = {name: label_of(original) for name, original in originals.items()}
    classes = set(labels.values())
    if all(word in NAMELESS or PART.fullmatch(word) for label in classes for word in words(label)):
        return dict.fromkeys(labels, ""), []  # IMG_1 beside DSC_1, train_1 beside test_1
    warnings = []
    doubtful = {label: base for label in classes if (base := label_of(label)) in classes and base}
    if doubtful:
        label, base = min(doubtful.items())
        warnings.append(
            f"{len(doubtful)} classes have the name of another class with a number, as {label!r} beside "
            f"{base!r}: if they are one class, rename images as in {base}_1.jpg, or name images and "
            "classes in a label file"
        )
    if copies := sorted(name for name, stem in stems.items() if stem != originals[name]):
        warnings.append(
            f"{len(copies)} files are taken for copies of others by their names ({listed(copies, 3)}), and "
            "have the labels of those"
        )
    if len(classes) > 1 and all(label.isdecimal() and len(label) >= SHORTEST_ID for label in classes):
        warnings.append(
            f"all classes are numbers ({listed(sorted(classes), 3)}): if these are numbers of pictures or "
            "patients, name images and classes in a label file"
        )
    return labels, warnings


def _original(stem: str, known: Collection[str]) -> str:
    """Return the name that a file is a copy of, or its own."""
    while (original := COPY.sub("", stem)) != stem and original in known:
        stem = original
    return stem


def label_of(stem: str) -> str:
    """Return what a name has before its running number: big_dog_12 -> big_dog; "" without one."""
    match = NAME.match(stem)
    return match["label"] if match else ""


def flat_images(source: Path) -> Listing:
    """List the images directly in `source` without hidden files and figures that this program wrote."""
    listing = list_images(source, recursive=False)
    listing.paths[:] = [p for p in listing.paths if not p.startswith(".") and not is_report(source / p)]
    return listing

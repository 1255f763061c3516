"""Layout "flat": images in one folder, each with its label in its name, as in cat.0.jpg."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from serve.contract.errors import UserError
from serve.contract.listing import Listing, list_images
from train.data.labels import LabelledPaths, listed
from train.data.layouts.listing import class_folders, describe_ignored, describe_left_out
from train.data.layouts.run_outputs import is_report

NAME = re.compile(r"^(?P<label>.*[^\s._-])[\s._-]+\(?\d+\)?$", re.DOTALL)
# cat.0 (1), cat.0 2, cat.0 - Copy (2): what browsers, Macs and Windows call a copy of cat.0
COPY_NUMBER = re.compile(r"\s\(?\d+\)?$")
COPY_WORD = re.compile(r"\s+(?:-\s+)?(?:copy|kopie|copie|copia)$", re.IGNORECASE)
MOST_COPIES = 3  # of one file; more are a class: Boeing 737 (1), ... beside Boeing (1)
SHORTEST_ID = 3  # digits


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
    facts = describe_left_out([], class_folders(source)[1])
    layout = "; ".join(["labels in the file names (label.number.suffix)", *facts])
    return LabelledPaths(source, labels, layout, warnings + describe_ignored(listing.ignored))


def labels_of(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return file name -> label, "" without one, and warnings about labels that may be none.

    Copies that a browser or a system has numbered (cat.0 (1).jpg) have the label of the original.
    """
    labels = {name: label_of(name) for name in names}
    by_label: defaultdict[str, list[str]] = defaultdict(list)
    for name, label in labels.items():
        by_label[label].append(name)
    copied, doubtful = _numbered(by_label)
    labels = {name: copied.get(label, label) for name, label in labels.items()}
    warnings = []
    if doubtful:
        label, base = min(doubtful.items())
        warnings.append(
            f"{len(doubtful)} classes are called as another class with a number, such as {label!r} beside "
            f"{base!r}: if they are one class, rename images as in {base}_1.jpg, or name images and "
            "classes in a label file"
        )
    if copies := sorted(name for label in copied for name in by_label[label]):
        warnings.append(
            f"{len(copies)} files are taken for copies of others by their names ({listed(copies, 3)}), and "
            "have the labels of those"
        )
    ids = sorted(set(labels.values()))
    if len(ids) > 1 and all(label.isdecimal() and len(label) >= SHORTEST_ID for label in ids):
        warnings.append(
            f"all classes are numbers ({listed(ids, 3)}): if these are numbers of pictures or patients, "
            "name images and classes in a label file"
        )
    return labels, warnings


def _numbered(by_label: Mapping[str, list[str]]) -> tuple[dict[str, str], dict[str, str]]:
    """Return labels that are another one with a number -> that one: those of copies, and all others."""
    bases = {label: base for label in by_label if (base := _label(COPY_WORD.sub("", label)))}
    few = {
        label: base
        for label, base in bases.items()
        if len(by_label[label]) <= MOST_COPIES and all(map(_is_numbered_copy, by_label[label]))
    }
    alone = Counter(base for label, base in few.items() if len(by_label[label]) == 1)
    copied: dict[str, str] = {}
    for label in sorted(few, key=len):  # a copy of a copy comes after it
        if (base := few[label]) in by_label or alone[base] > 1:
            copied[label] = copied.get(base, base)
    doubtful = {label: base for label, base in bases.items() if label not in copied and base in by_label}
    return copied, doubtful


def label_of(name: str) -> str:
    """Return what a file name has before its running number: big_dog_12.jpg -> big_dog; "" without one."""
    return _label(os.path.splitext(name)[0])


def _label(stem: str) -> str:
    match = NAME.match(stem)
    return match["label"] if match else ""


def _is_numbered_copy(name: str) -> bool:
    return bool(COPY_NUMBER.search(os.path.splitext(name)[0]))


def flat_images(source: Path) -> Listing:
    """List the images directly in `source` without hidden files and figures that this program wrote."""
    listing = list_images(source, recursive=False)
    listing.paths[:] = [p for p in listing.paths if not p.startswith(".") and not is_report(source / p)]
    return listing

"""Listing of a folder for its layouts: folders that may be classes, and files that are no images."""

import os
import re
from collections import Counter
from pathlib import Path

from serve.contract.formats import UNREAD_SUFFIX
from serve.contract.listing import system_folder
from serve.contract.packed import SUFFIXES

CURES = {
    "convert {}, for instance by magick mogrify -format jpg FILES": UNREAD_SUFFIX,
    "unpack {}": re.compile("|".join(re.escape(suffix) for suffix in SUFFIXES if suffix != ".parquet")),
    "convert {} by python train/data/convert_parquet.py FOLDER --output SHARDS": re.compile(r"\.parquet"),
    "write the images in {} as files": re.compile(r"\.(?:arrow|tfrecords?|mdb|np[yz]|mat|h5|hdf5|pkl)"),
    "take frames from {}, for instance by ffmpeg": re.compile(r"\.(?:mp4|m4v|mov|avi|mkv|webm)"),
}
"""How to make images of files -> the suffixes of such files."""


def class_folders(root: Path) -> tuple[list[str], Counter[str]]:
    """Return the sorted names of folders that may be classes, and counts of system folders by name."""
    folders: list[str] = []
    system: Counter[str] = Counter()
    for name in sorted(os.listdir(root)):
        if not os.path.isdir(root / name):
            continue
        if system_folder(f"{name}/") or os.path.isfile(root / name / "pyvenv.cfg"):  # Python's environments
            system[name] += 1
        elif not name.startswith("."):
            folders.append(name)
    return folders, system


def describe_left_out(outputs: list[str], system: Counter[str]) -> list[str]:
    """Return lines about folders that hold output of this program and about system folders, if any."""
    lines = [f"output of this program left out ({', '.join(map(repr, outputs))})"] if outputs else []
    if system:
        lines.append(f"{system.total()} system folders left out ({count_by_name(system)})")
    return lines


def describe_ignored(ignored: Counter[str]) -> list[str]:
    """Return a line about files that are no images by their suffix, with the cure, if there are some."""
    kinds = Counter({suffix: count for suffix, count in ignored.items() if suffix})
    if not kinds:
        return []
    line = f"{kinds.total()} files are no images by their suffix ({count_by_name(kinds)})"
    for cure, pattern in CURES.items():
        if suffixes := [suffix for suffix, _ in kinds.most_common() if pattern.fullmatch(suffix)]:
            line += f"; {cure.format(', '.join(suffixes))}"
    return [line]


def count_by_name(counts: Counter[str]) -> str:
    listed = [f"{name} {count}" for name, count in counts.most_common(5)]
    return ", ".join([*listed, "..."] if len(counts) > 5 else listed)

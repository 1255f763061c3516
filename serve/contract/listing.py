"""Which files below a folder are images by their names, and which folders hold none."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from serve.contract.files import MAY_PASS
from serve.contract.formats import IMAGE_SUFFIXES, kind_of_other

# What network disks, operating systems and tools keep beside people's files: thumbnails, deleted files,
# older versions. Plain words that may name a class are none of them.
SYSTEM_FOLDERS = (
    r"@eadir|#recycle|@recycle|@recently-snapshot|[#~]snapshot|\.?@__thumb|@tmp|@sharebin"  # network disks
    r"|\.snap(?:shots?)?|\.zfs|\.recycle|\.glusterfs|\.minio\.sys|\.wdmc|\.tmb"
    r"|lost\+found|\.trash(?:es|-\d+)?|\.thumb(?:nail)?s?"  # Linux
    r"|\$recycle\.bin|system volume information|found\.\d{3}|_vti_cnf|_gsdata_"  # Windows
    r"|__macosx|\.apple(?:double|db|desktop)|network trash folder|temporary items|\.temporaryitems"  # macOS
    r"|\.spotlight-v100|\.fseventsd|\.documentrevisions-v100|\.picasaoriginals"
    r"|\.stversions|\.dropbox\.cache|\.sync|\.git|\.hg|\.svn"  # older versions
    r"|\.ipynb_checkpoints|__pycache__|(?:site|dist)-packages|node_modules"  # Python, JavaScript
)
SYSTEM_PATH = re.compile(rf"(?:^|(?<=/))(?:{SYSTEM_FOLDERS})(?=/)", re.IGNORECASE)
CONFIG_MAP = ("..data", "..20")
"""How the folders begin in which a mounted ConfigMap keeps its files, beside links to them."""


@dataclass(frozen=True)
class Listing:
    """What `list_images` found below a folder; every path is relative, with forward slashes."""

    paths: list[str]
    """Files with an image suffix, sorted by code point."""
    problems: dict[str, str]
    """Folders that were not entered (a link, not readable) and why."""
    ignored: Counter[str]
    """How many other files there are of which kind, as `kind_of_other` names it."""
    system: Counter[str] = field(default_factory=Counter)
    """How many system folders, which were not entered, have which name."""


def list_images(root: str | os.PathLike[str], recursive: bool = True) -> Listing:
    """List all files below `root` whose suffix is an image's, of any kind: opening decides.

    Linked folders are reported, not followed: links can lead out and round in circles.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: `root` itself cannot be listed.
        OSError: a folder cannot be listed now (MAY_PASS).
    """
    listing = Listing([], {}, Counter())
    for name, kind, problem in walk_images(root, recursive):
        if problem:
            listing.problems[name] = problem
        elif kind == "image":
            listing.paths.append(name)
        elif kind == "system":
            listing.system[name.rpartition("/")[2]] += 1
        else:
            listing.ignored[kind_of_other(name)] += 1
    listing.paths.sort()
    return listing


def walk_images(
    root: str | os.PathLike[str], recursive: bool = True
) -> Iterator[tuple[str, Literal["image", "other", "folder", "system"], str]]:
    """Yield (relative path, kind, problem or "") as `list_images` sorts them, in the order of the disk.

    A system folder is named and not entered. Only the names of folders not entered yet are held in memory.
    """
    waiting = [""]  # no recursion: folders can be nested more deeply than Python's calls
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(Path(root) / prefix) as scan:
                for entry in scan:
                    name = prefix + entry.name
                    linked = _is_linked_folder(entry)
                    if not linked and not entry.is_dir(follow_symlinks=False):
                        yield name, "image" if has_image_suffix(name) else "other", ""
                    elif not recursive or entry.name.startswith(CONFIG_MAP):
                        continue
                    elif system_folder(entry.name + "/"):
                        yield name, "system", ""
                    elif linked:
                        yield name, "folder", "linked folder, not followed"
                    else:
                        waiting.append(name + "/")
        except OSError as error:
            if not prefix or error.errno in MAY_PASS:  # its images would have no rows
                raise
            yield prefix, "folder", f"cannot list this folder: {error.strerror}"


def system_folder(path: str) -> str:
    """Return `path` up to its first system folder, "" without one. A folder's own path ends with "/"."""
    found = SYSTEM_PATH.search(path)
    return path[: found.end()] if found else ""


def has_image_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _is_linked_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a link to itself
        return False

"""What --images can name: a folder, an image, a list, tar files, a pattern of them, remote or not.

Every source is an inventory of sorted names and a function that reads one of them.
"""

import glob
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from serve import remote
from serve.inventory import PROBLEM, Entry, Inventory
from serve.lists import listed_in_csv, listed_lines
from serve.preprocess import ImageError, has_image_suffix, read_image_file, walk_images
from serve.remote import is_remote
from serve.tars import Tars

LIST_SUFFIXES = (".txt", ".lst")
MANIFEST_SUFFIX = ".csv"
TAR_SUFFIX = ".tar"
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
WILDCARDS = re.compile(r"[*?\[{]")
MAX_PATTERN_FILES = 1_000_000

Read = Callable[[Entry], bytes]


@dataclass(frozen=True)
class Source:
    inventory: Inventory
    read: Read
    """The bytes of an entry. Raises ImageError or OSError; called from several threads."""
    ignored: int
    """Files without an image suffix, which are no inputs."""
    place: str = ""
    """Absolute path or URL of what --images named: other places may hold other images of the same names."""


def open_source(images: str) -> Source:
    """Raises ValueError when there is nothing to score, OSError when it cannot be listed."""
    if is_remote(images):
        source = _open_remote(images)
    elif os.path.isdir(images):
        source = _folder(images)
    elif os.path.isfile(images):
        source = _open_file(images)
    elif WILDCARDS.search(images):
        source = _pattern(images)
    else:
        raise ValueError(f"--images {images!r} does not exist or is neither a folder nor a regular file")
    problems = [entry for entry in islice(source.inventory.entries(), 1000) if entry.problem]
    if len(problems) == len(source.inventory):
        described = [f"{entry.name}: {entry.problem}" for entry in problems[:3]]
        hint = "; for tar files give a pattern, as in 'FOLDER/*.tar'" if source.ignored else ""
        found = f", {len(problems)} problems {described}" if problems else ""
        raise ValueError(f"no images in {images!r}: {source.ignored} other files{found}{hint}")
    place = images if is_remote(images) else os.path.abspath(images)
    return replace(source, place=place.rstrip("/"))


def _collect(entries: Iterator[Entry | None], read: Read) -> Source:
    ignored = 0

    def images() -> Iterator[Entry]:
        nonlocal ignored
        for entry in entries:
            if entry is None:
                ignored += 1
            else:
                yield entry

    def read_or_refuse(entry: Entry) -> bytes:
        if entry.problem:
            raise ImageError(entry.problem)
        return read(entry)

    inventory = Inventory.sort(images())
    return Source(inventory, read_or_refuse, ignored)


def _folder(root: str) -> Source:
    def entries() -> Iterator[Entry | None]:
        for name, kind, problem in walk_images(root):
            if problem:
                yield Entry(name, PROBLEM + problem)
            else:
                yield Entry(name) if kind == "image" else None

    return _collect(entries(), lambda entry: read_image_file(os.path.join(root, entry.name)))


def _open_file(path: str) -> Source:
    return _by_suffix(path, os.path.dirname(path))


def _by_suffix(path: str, folder: str) -> Source:
    """One file or object, by its suffix: a list, a manifest, a tar file, or else an image."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in LIST_SUFFIXES:
        return _listed(path, folder, listed_lines(path))
    if suffix == MANIFEST_SUFFIX:
        return _listed(path, folder, listed_in_csv(path))
    return _files([path], folder)


def _files(paths: list[str], base: str) -> Source:
    """Tar files and images, named relative to `base`."""
    tars = Tars()
    prefix = base.rstrip("/") + "/" if base else ""

    def entries() -> Iterator[Entry | None]:
        for path in paths:
            name = path.removeprefix(prefix)
            if not is_remote(path):
                name = name.lstrip("/")  # a doubled slash is none; in an object's key it is one
            if path.lower().endswith(TAR_SUFFIX):
                yield from tars.index(path, name)
            elif path.lower().endswith(COMPRESSED_TARS):
                raise ValueError(f"{path} is compressed, so its members have no places: decompress it")
            else:
                yield Entry(name)

    def read(entry: Entry) -> bytes:
        if entry.place:
            return tars.read(entry)
        return _read_path(entry.name if is_remote(entry.name) else prefix + entry.name)

    return _collect(entries(), read)


def _read_path(path: str) -> bytes:
    return remote.read_object(path) if is_remote(path) else read_image_file(path)


# -- lists -----------------------------------------------------------------------------------------------


def _listed(path: str, folder: str, names: Iterator[str]) -> Source:
    """Paths and URLs in a file; what is relative is relative to the file's own folder."""

    def read(entry: Entry) -> bytes:
        if is_remote(entry.name):
            return remote.read_object(entry.name)
        if is_remote(folder):
            return remote.read_object(remote.join_url(folder, entry.name))
        return read_image_file(os.path.join(folder, entry.name))

    source = _collect((Entry(name) for name in names), read)
    if not len(source.inventory):
        raise ValueError(f"no images in {path!r}: the list is empty")
    return source


# -- patterns --------------------------------------------------------------------------------------------


def _pattern(pattern: str) -> Source:
    paths: list[str] = []
    for expanded in expand_braces(pattern):
        wildcard = re.search(r"[*?\[]", expanded)
        if wildcard is None:
            paths.append(expanded)  # one that is missing is an error row, not a silent gap
        elif is_remote(expanded):
            paths += remote.match(expanded)
        else:
            links = Links(os.path.dirname(expanded[: wildcard.start()]))
            paths += (
                path
                for path in glob.iglob(expanded, recursive=True)
                if not os.path.isdir(path) and not ("**" in expanded and links.lead_to(path))
            )
    if not paths or not any(is_remote(path) or os.path.exists(path) for path in paths):
        raise ValueError(f"--images {pattern!r} matches no file")
    found = WILDCARDS.search(pattern)
    assert found is not None
    base = pattern[: found.start()].rpartition("/")[0]
    if not base and any(path.startswith("/") for path in paths):  # also of {/a,/b}/*.png
        base, paths = "/", [path if is_remote(path) else os.path.abspath(path) for path in paths]
    return _files(sorted(set(paths)), base)


class Links:
    """Folders below `base` that are links: they are not followed, as in a folder that is searched."""

    def __init__(self, base: str):
        self.known: dict[str, bool] = {base: False, "": False, "/": False}

    def lead_to(self, path: str) -> bool:
        """Whether one is on the way to this file."""
        folder = os.path.dirname(path)
        if folder not in self.known:
            self.known[folder] = os.path.islink(folder) or self.lead_to(folder)
        return self.known[folder]


def expand_braces(pattern: str) -> list[str]:
    """a{0..2}.tar -> a0.tar a1.tar a2.tar; {08..10} keeps the zeros; {x,y} are alternatives."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        first, last = numbers.groups()
        if int(last) - int(first) >= MAX_PATTERN_FILES:
            raise ValueError(f"{found[0]} stands for more than {MAX_PATTERN_FILES} files")
        width = len(first) if first.startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    else:
        choices = found[1].split(",")
    return [whole for choice in choices for whole in expand_braces(before + choice + after)]


# -- remote ----------------------------------------------------------------------------------------------


def _open_remote(url: str) -> Source:
    if (WILDCARDS.search(url) and not url.startswith("http")) or "{" in url:
        return _pattern(url)
    known = (*LIST_SUFFIXES, MANIFEST_SUFFIX, TAR_SUFFIX, *COMPRESSED_TARS)
    if url.lower().endswith(known) or has_image_suffix(url) or (url.startswith("http") and url[-1] != "/"):
        return _by_suffix(url, url.rpartition("/")[0])
    root = url.rstrip("/")
    names = remote.list_objects(root)
    entries = (Entry(name) if has_image_suffix(name) else None for name in names)
    return _collect(entries, lambda entry: remote.read_object(f"{root}/{entry.name}"))

"""What --images can name: a folder, an image, a list, tar files, a pattern of them, remote or not.

Every source is an inventory of sorted names and a function that reads one of them.
"""

import csv
import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import IO

from serve import remote
from serve.formats import kind_of_other, unread_pictures
from serve.inventory import PROBLEM, Entry, Inventory
from serve.preprocess import ImageError, has_image_suffix, read_image_file, system_folder, walk_images
from serve.remote import is_remote
from serve.tars import Tars

LIST_SUFFIXES = (".txt", ".lst")
MANIFEST_SUFFIX = ".csv"
TAR_SUFFIX = ".tar"
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_LINE_BYTES = 1 << 16
BOM = b"\xef\xbb\xbf"  # Windows marks UTF-8 with it
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
    others: Counter[str] = field(default_factory=Counter)
    """How many of them there are of which kind, as `kind_of_other` says."""
    system: Counter[str] = field(default_factory=Counter)
    """How many system folders (@eaDir, lost+found, ...), which hold no inputs, have which name."""
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
        if any(entry.problem.startswith("linked folder") for entry in problems):
            hint += "; name the folder that a link leads to, or list the files in a .txt file"
        if unread := unread_pictures(source.others):
            hint = f"; {unread}"
        left = f", {left_out(source)}" if source.system else ""
        raise ValueError(f"no images in {images!r}: {source.ignored} other files{left}{found}{hint}")
    place = images if is_remote(images) else os.path.abspath(images)
    return replace(source, place=place.rstrip("/"))


def left_out(source: Source) -> str:
    """What a user should know about system folders; "" when there are none."""
    if not source.system:
        return ""
    names = ", ".join(f"{name} {count}" for name, count in source.system.most_common(5))
    more = ", ..." if len(source.system) > 5 else ""
    return f"{source.system.total()} system folders left out ({names}{more})"


def _collect(entries: Iterator[Entry | str | None], read: Read) -> Source:
    """An input for each Entry; None is a file that is none, and text is the path of a system folder."""
    ignored = 0
    system: set[str] = set()

    def images() -> Iterator[Entry]:
        nonlocal ignored
        for entry in entries:
            if entry is None:
                ignored += 1
            elif isinstance(entry, str):
                system.add(entry.rstrip("/"))
            else:
                yield entry

    def read_or_refuse(entry: Entry) -> bytes:
        if entry.problem:
            raise ImageError(entry.problem)
        return read(entry)

    inventory = Inventory.sort(images())
    names = Counter(path.rpartition("/")[2] for path in system)
    return Source(inventory, read_or_refuse, ignored, names)


def _folder(root: str) -> Source:
    others: Counter[str] = Counter()

    def entries() -> Iterator[Entry | str | None]:
        for name, kind, problem in walk_images(root):
            if problem:
                yield Entry(name, PROBLEM + problem)
            elif kind == "system":
                yield name
            else:
                yield _entry(name, others)

    source = _collect(entries(), lambda entry: read_image_file(os.path.join(root, entry.name)))
    return replace(source, others=others)


def _entry(name: str, others: Counter[str]) -> Entry | None:
    """None for a file that is no image, which is counted."""
    if has_image_suffix(name):
        return Entry(name)
    others[kind_of_other(name)] += 1
    return None


def _open_file(path: str) -> Source:
    return _by_suffix(path, os.path.dirname(path))


def _by_suffix(path: str, folder: str) -> Source:
    """One file or object, by its suffix: a list, a manifest, a tar file, or else an image."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in LIST_SUFFIXES:
        return _listed(path, folder, _lines(path))
    if suffix == MANIFEST_SUFFIX:
        return _listed(path, folder, _manifest_paths(path))
    return _files([path], folder)


def _files(paths: list[str], base: str, pattern: str = "") -> Source:
    """Tar files and images, named relative to `base`; of system folders, those that `pattern` names."""
    tars = Tars()
    prefix = base.rstrip("/") + "/" if base else ""

    def entries() -> Iterator[Entry | str | None]:
        for path in paths:
            name = path.removeprefix(prefix)
            if not is_remote(path):
                name = name.lstrip("/")  # a doubled slash is none; in an object's key it is one
            folder = system_folder(name)
            if folder and folder.rstrip("/").rpartition("/")[2] not in pattern:
                yield folder
            elif path.lower().endswith(TAR_SUFFIX):
                yield from tars.index(path, name)
            elif path.lower().endswith(COMPRESSED_TARS):
                raise ValueError(f"{path} is compressed, so its members have no places: decompress it")
            else:
                yield Entry(name)

    def read(entry: Entry) -> bytes:
        if entry.place:
            return tars.read(entry)
        return _read_path(entry.name if is_remote(entry.name) else prefix + entry.name)

    return replace(_collect(entries(), read), others=tars.others)


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


def _open_bytes(path: str) -> IO[bytes]:
    return remote.download(path) if is_remote(path) else open(path, "rb")


def _lines(path: str) -> Iterator[str]:
    """The lines of a text file, without their ends. Empty lines are passed over."""
    with _open_bytes(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES or b"\0" in line:
                raise ValueError(f"{path}: line {number} is no path: is this a list of images?")
            if number == 1:
                line = line.removeprefix(BOM)
            name = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")
            if name:
                yield name


def _manifest_paths(path: str) -> Iterator[str]:
    with _open_bytes(path) as file:
        if file.read(3) != BOM:
            file.seek(0)
        lines = (line.decode("utf-8", "surrogateescape") for line in iter(file.readline, b""))
        reader = csv.reader(lines, strict=True)  # else a quote that is left open takes all that follows
        try:
            columns = [name.strip() for name in next(reader, [])]
            if columns.count("path") != 1:
                count = columns.count("path") or "no"
                raise ValueError(f"{path}: {count} column 'path' among {columns[:10]}; it needs one")
            at = columns.index("path")
            for row in reader:
                if row and (len(row) <= at or not row[at]):
                    raise ValueError(f"{path}: line {reader.line_num} has no path")
                if row:
                    yield row[at]
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num} is not CSV: {error}") from error


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
    return _files(sorted(set(paths)), base, pattern)


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
    others: Counter[str] = Counter()
    entries = (system_folder(name) or _entry(name, others) for name in names)
    source = _collect(entries, lambda entry: remote.read_object(f"{root}/{entry.name}"))
    return replace(source, others=others)

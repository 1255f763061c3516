"""What --images can name: a folder, an image, a list, tar files, a pattern of them, remote or not.

Every source is an inventory of sorted names and a function that reads one of them.
"""

import glob
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

from serve import storage as remote
from serve.contract.archive import file_stamp, plain
from serve.contract.errors import UserError
from serve.contract.formats import kind_of_other, unread_pictures
from serve.contract.images import ImageError, read_image_file
from serve.contract.listing import has_image_suffix, system_folder, walk_images
from serve.contract.urls import redact, unsigned, url_path
from serve.inputs.inventory import PROBLEM, Entry, Inventory, Same
from serve.inputs.lists import listed_in_csv, listed_lines
from serve.inputs.tars import Tars
from serve.storage import is_remote

LIST_SUFFIXES = (".txt", ".lst")
MANIFEST_SUFFIX = ".csv"
TAR_SUFFIX = ".tar"
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
WILDCARDS = re.compile(r"[*?\[{]")
MAX_PATTERN_FILES = 1_000_000
NO_PROBLEM = "\1"  # in place of PROBLEM in what is none

Read = Callable[[Entry], bytes]
Stamp = Callable[[Entry], str]


@dataclass(frozen=True)
class Source:
    inventory: Inventory
    read: Read
    """The bytes of an entry. Raises ImageError or OSError; called from several threads."""
    ignored: int
    """Files without an image suffix, which are no inputs."""
    stamp: Stamp
    """Of an entry's file: another when it was changed or replaced; "" where that is not known (URLs that
    were not listed by their store)."""
    others: Counter[str] = field(default_factory=Counter)
    """How many of them there are of which kind, as `kind_of_other` says."""
    system: Counter[str] = field(default_factory=Counter)
    """How many system folders (@eaDir, lost+found, ...), which hold no inputs, have which name."""
    place: str = ""
    """Absolute path or URL of what --images named: other places may hold other images of the same names."""


def open_source(images: str) -> Source:
    """Raises UserError when there is nothing to score, OSError when it cannot be listed."""
    if is_remote(images):
        source = _open_remote(images)
    elif os.path.isdir(images):
        source = _folder(images)
    elif os.path.isfile(images):
        source = _open_file(images)
    elif WILDCARDS.search(images):
        source = _pattern(images)
    else:
        raise UserError(f"--images {images!r} does not exist or is neither a folder nor a regular file")
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
        raise UserError(f"no images in {redact(images)!r}: {source.ignored} other files{left}{found}{hint}")
    place = redact(images, hidden="") if is_remote(images) else os.path.abspath(images)
    return replace(source, place=place.rstrip("/"))


def left_out(source: Source) -> str:
    """What a user should know about system folders; "" when there are none."""
    if not source.system:
        return ""
    names = ", ".join(f"{name} {count}" for name, count in source.system.most_common(5))
    more = ", ..." if len(source.system) > 5 else ""
    return f"{source.system.total()} system folders left out ({names}{more})"


def _collect(
    entries: Iterator[Entry | str | None], read: Read, stamp: Stamp, same: Same = lambda a, b: True
) -> Source:
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

    inventory = Inventory.sort(images(), same)
    return Source(
        inventory,
        read_or_refuse,
        ignored,
        lambda entry: entry.place if entry.problem else stamp(entry),
        system=Counter(path.rpartition("/")[2] for path in sorted(system)),
    )


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

    def path(entry: Entry) -> str:
        return os.path.join(root, entry.name)

    source = _collect(
        entries(), lambda entry: read_image_file(path(entry)), lambda entry: file_stamp(path(entry))
    )
    return replace(source, others=others)


def _entry(name: str, others: Counter[str], place: str = "") -> Entry | None:
    """None for a file that is no image, which is counted."""
    if has_image_suffix(name):
        return Entry(name, place)
    others[kind_of_other(name)] += 1
    return None


def _open_file(path: str) -> Source:
    return _by_suffix(path, os.path.dirname(path))


def _by_suffix(path: str, folder: str) -> Source:
    """One file or object, by its suffix: a list, a manifest, a tar file, or else an image."""
    suffix = os.path.splitext(url_path(path))[1].lower()
    if suffix in LIST_SUFFIXES:
        return _listed(path, folder, listed_lines(path))
    if suffix == MANIFEST_SUFFIX:
        return _listed(path, folder, listed_in_csv(path))
    return _files([path], folder)


def _files(paths: list[str], base: str, pattern: str = "") -> Source:
    """Tar files and images, named relative to `base`; of system folders, those that `pattern` names."""
    tars = Tars()
    prefix = base.rstrip("/") + "/" if base else ""

    def entries() -> Iterator[Entry | str | None]:
        for path in paths:
            name = path.removeprefix(prefix)
            if is_remote(path):
                name = redact(path, hidden="").removeprefix(redact(prefix, hidden=""))
            else:
                name = name.lstrip("/")  # a doubled slash is none; in an object's key it is one
            kind = url_path(path).lower()
            folder = system_folder(name)
            if folder and folder.rstrip("/").rpartition("/")[2] not in pattern:
                yield folder
            elif kind.endswith(TAR_SUFFIX):
                yield from tars.index(path, name)
            elif kind.endswith(COMPRESSED_TARS):
                raise UserError(f"{path} is compressed, so its members have no places: decompress it")
            else:
                yield Entry(name, _place(path))

    def read(entry: Entry) -> bytes:
        if url := _url_of(entry):
            return remote.read_object(url)
        return tars.read(entry) if entry.place else read_image_file(prefix + entry.name)

    def stamp(entry: Entry) -> str:
        if _url_of(entry):
            return ""
        return tars.stamp(entry) if entry.place else file_stamp(prefix + entry.name)

    source = _collect(entries(), read, stamp, partial(_same_input, prefix))
    return replace(source, others=tars.others)


def _place(target: str) -> str:
    """A URL as an entry's place: its name is without the secrets. "" of a path, which is its own name."""
    return target.replace(PROBLEM, NO_PROBLEM) if is_remote(target) else ""


def _absolute(path: str) -> str:
    """Without ./ and //, but with .., which may follow a link."""
    return "/" + plain(os.path.join(os.getcwd(), path))


def _same_input(base: str, one: Entry, other: Entry) -> bool:
    """Whether two entries of one key, with names relative to `base`, are one input.

    Raises:
        UserError: they are URLs, and nothing that a row may show tells them apart.
    """
    if is_remote(one.place) and is_remote(other.place):
        if unsigned(one.place) != unsigned(other.place):
            raise UserError(
                f"two URLs differ in a secret only, so that their rows would have one name, {one.name!r}: "
                "score them in two calls"
            )
        return True
    paths = [os.path.join(base, entry.name) for entry in (one, other)]
    if _absolute(paths[0]) == _absolute(paths[1]):
        return True
    try:  # an accent in one code point or in two: some file systems make no difference
        return os.path.samefile(*paths)
    except OSError:
        return False


def _url_of(entry: Entry) -> str:
    """ "" for what is no URL."""
    return entry.place.replace(NO_PROBLEM, PROBLEM) if is_remote(entry.place) else ""


# -- lists -----------------------------------------------------------------------------------------------


def _listed(path: str, folder: str, names: Iterator[str]) -> Source:
    """Paths and URLs in a file; what is relative is relative to the file's own folder."""

    base = redact(folder, hidden="") if is_remote(folder) else _absolute(folder).rstrip("/")

    def entry(name: str) -> Entry:
        if is_remote(name) or is_remote(folder):
            url = name if is_remote(name) else remote.join_url(folder, name)
            key = redact(url, hidden="").removeprefix(f"{base}/")
            return Entry(redact(name, hidden=""), _place(url), key)
        key = _absolute(os.path.join(folder, name)).removeprefix(f"{base}/")
        return Entry(name, key=unicodedata.normalize("NFC", key))

    def read(entry: Entry) -> bytes:
        if url := _url_of(entry):
            return remote.read_object(url)
        return read_image_file(os.path.join(folder, entry.name))

    def stamp(entry: Entry) -> str:
        return "" if _url_of(entry) else file_stamp(os.path.join(folder, entry.name))

    source = _collect(map(entry, names), read, stamp, partial(_same_input, folder))
    if not len(source.inventory):
        raise UserError(f"no images in {redact(path)!r}: the list is empty")
    return source


# -- patterns --------------------------------------------------------------------------------------------


def _pattern(pattern: str) -> Source:
    paths: list[str] = []
    for expanded in expand_braces(pattern):
        wildcard = re.search(r"[*?\[]", url_path(expanded))
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
        raise UserError(f"--images {pattern!r} matches no file")
    found = WILDCARDS.search(pattern)
    assert found is not None
    base = pattern[: found.start()].rpartition("/")[0]
    if not base and any(path.startswith("/") for path in paths):  # also of {/a,/b}/*.png
        base, paths = "/", [path if is_remote(path) else os.path.abspath(path) for path in paths]
    unique = {path if is_remote(path) else _absolute(path): path for path in sorted(paths)}
    return _files(sorted(unique.values()), base, pattern)


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
            raise UserError(f"{found[0]} stands for more than {MAX_PATTERN_FILES} files")
        width = len(first) if first.startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    else:
        choices = found[1].split(",")
    return [whole for choice in choices for whole in expand_braces(before + choice + after)]


# -- remote ----------------------------------------------------------------------------------------------


def _open_remote(url: str) -> Source:
    path = url_path(url)
    if (WILDCARDS.search(url) and not url.startswith("http")) or "{" in url:
        return _pattern(url)
    known = (*LIST_SUFFIXES, MANIFEST_SUFFIX, TAR_SUFFIX, *COMPRESSED_TARS)
    is_file = path.lower().endswith(known) or has_image_suffix(path)
    if is_file or (url.startswith("http") and path[-1] != "/"):
        return _by_suffix(url, path.rpartition("/")[0])
    root = url.rstrip("/")
    others: Counter[str] = Counter()
    entries = (
        system_folder(name) or _entry(name, others, stamp.replace(PROBLEM, NO_PROBLEM))
        for name, stamp in remote.list_stamped(root)
    )
    source = _collect(
        entries, lambda entry: remote.read_object(f"{root}/{entry.name}"), lambda entry: entry.place
    )
    return replace(source, others=others)

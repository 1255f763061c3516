"""Images and tar files that are named by paths, URLs or a pattern of them."""

import glob
import os
import re
from collections.abc import Iterator

from serve import storage
from serve.contract.archive import SUFFIX as TAR_SUFFIX
from serve.contract.errors import UserError
from serve.contract.listing import system_folder
from serve.contract.packed import describe_packed, packed_by_name
from serve.contract.urls import is_remote, redact, url_path
from serve.inputs.base import Inputs, absolute
from serve.inputs.inventory import Entry
from serve.inputs.tars import Tars

LIST_SUFFIXES = (".txt", ".lst")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
WILDCARDS = re.compile(r"[*?\[{]")
MAX_PATTERN_FILES = 1_000_000


class Files(Inputs):
    """Each is an image, or a tar file of images."""

    def __init__(self, paths: list[str], base: str, pattern: str = ""):
        """Names are relative to `base`. System folders are left out, but for those that `pattern` names."""
        super().__init__(base)
        self.paths, self.pattern = paths, pattern
        self.prefix = base.rstrip("/") + "/" if base else ""
        self.tars = Tars(self.left_out)

    def entries(self) -> Iterator[Entry]:
        for path in self.paths:
            name, kind = self._name(path), url_path(path).lower()
            folder = system_folder(name).rstrip("/")
            if folder and folder.rpartition("/")[2] not in self.pattern:
                self.left_out.system.add(folder)
            elif kind.endswith(TAR_SUFFIX):
                yield from self.tars.index(path, name)
            elif packed := packed_by_name(kind):
                raise UserError(f"{redact(path)} is {describe_packed(packed, redact(path))}")
            else:
                yield Entry(name, path if is_remote(path) else "")

    def _name(self, path: str) -> str:
        if is_remote(path):
            return redact(path, hidden="").removeprefix(redact(self.prefix, hidden=""))
        return path.removeprefix(self.prefix).lstrip("/")  # a doubled slash, which is part of a key

    def read(self, entry: Entry) -> bytes:
        return self.tars.read(entry) if _is_member(entry) else super().read(entry)

    def stamp(self, entry: Entry) -> str:
        return self.tars.stamp(entry) if _is_member(entry) else super().stamp(entry)


def _is_member(entry: Entry) -> bool:
    return bool(entry.location) and not is_remote(entry.location)


def match_files(pattern: str) -> Files:
    """Return the files that a pattern with wildcards or braces matches. Raises UserError without any."""
    paths: list[str] = []
    folders = 0
    for expanded in expand_braces(pattern):
        wildcard = re.search(r"[*?\[]", url_path(expanded))
        if wildcard is None and os.path.isdir(expanded):
            folders += 1
        elif wildcard is None:
            paths.append(expanded)  # one that is missing is an error row, not a silent gap
        elif is_remote(expanded):
            urls, count = storage.match(expanded)
            paths += urls
            folders += count * ("**" not in expanded)
        else:
            base, linked = os.path.dirname(expanded[: wildcard.start()]), dict[str, bool]()
            # a folder's name may hold [, as no pattern that matches does
            literal = expanded.replace("[", "[[]")
            for path in glob.glob(expanded, recursive=True) or glob.glob(literal, recursive=True):
                folder = os.path.dirname(path)
                if folder not in linked:
                    linked[folder] = "**" in expanded and _is_below_link(folder, base)
                if os.path.isdir(path):
                    folders += "**" not in expanded
                elif not linked[folder]:
                    paths.append(path)
    if not any(is_remote(path) or os.path.exists(path) for path in paths):
        cure = f" but {folders} folders: add '/**/*.jpg' to it" if folders else ""
        raise UserError(f"--images {pattern!r} matches no file{cure}")
    found = WILDCARDS.search(pattern)
    assert found is not None
    base = pattern[: found.start()].rpartition("/")[0]
    if not base and any(path.startswith("/") for path in paths):  # also of {/a,/b}/*.png
        base, paths = "/", [path if is_remote(path) else os.path.abspath(path) for path in paths]
    unique = {path if is_remote(path) else absolute(path): path for path in sorted(paths)}
    files = Files(sorted(unique.values()), base, pattern)
    files.left_out.folders = folders
    return files


def _is_below_link(folder: str, base: str) -> bool:
    """Return whether a link leads from `base` to a folder: as in a folder's search, none is followed."""
    way = os.path.relpath(folder or ".", base or ".")
    return os.path.realpath(folder) != os.path.normpath(os.path.join(os.path.realpath(base), way))


def expand_braces(pattern: str) -> list[str]:
    """Expand a{0..2}.tar to a0.tar a1.tar a2.tar; {08..10} keeps the zeros; {x,y} are alternatives."""
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

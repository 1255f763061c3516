"""Open what --images names: a folder, an image, a list, tar files, a pattern of them, remote or not."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from serve import storage
from serve.contract.archive import SUFFIX as TAR_SUFFIX
from serve.contract.errors import UserError
from serve.contract.formats import NO_SUFFIX, count_by_name, describe_ignored, unread_pictures
from serve.contract.listing import has_image_suffix
from serve.contract.packed import SUFFIXES, look_into
from serve.contract.urls import is_http, is_remote, redact, url_path
from serve.inputs.base import Inputs
from serve.inputs.files import LIST_SUFFIXES, TABLE_SUFFIXES, WILDCARDS, Files, match_files
from serve.inputs.folders import LocalFolder, RemoteFolder
from serve.inputs.inventory import Entry, Inventory


@dataclass(frozen=True)
class Source:
    """The sorted inputs of a job, and how each is read."""

    inputs: Inputs
    inventory: Inventory
    location: str
    """Absolute path or URL of what --images named: another one may hold other images of the same names."""

    @property
    def ignored(self) -> int:
        """Number of files without an image suffix."""
        return self.inputs.left_out.others.total()

    @property
    def system(self) -> Counter[str]:
        """How many system folders have which name."""
        paths = sorted(self.inputs.left_out.system)
        return Counter(path.rstrip("/").rpartition("/")[2] for path in paths)

    def read(self, entry: Entry) -> bytes:
        """Return the bytes of an entry; called from several threads. Raises UserError or OSError."""
        if entry.problem:
            raise UserError(entry.problem)
        return self.inputs.read(entry)

    def stamp(self, entry: Entry) -> str:
        """Return a text that is another one when the entry's file was changed or replaced; "": unknown."""
        return f"{entry.location}!{entry.problem}" if entry.problem else self.inputs.stamp(entry)

    def describe_left_out(self, every: bool = False) -> list[str]:
        """Return a line for files and one for folders that are left out and may be missed: of files for
        pictures, or for `every` kind."""
        lines = (describe_ignored if every else unread_pictures)(self.inputs.left_out.others)
        if system := self.system:
            lines.append(f"{system.total()} system folders left out ({count_by_name(system)})")
        if folders := self.inputs.left_out.folders:
            lines.append(
                f"{folders} folders left out, which the pattern matches: ** stands for all below one"
            )
        return lines


def open_source(images: str) -> Source:
    """List what a value of --images names. Raises UserError when there is nothing to score, OSError when it
    cannot be listed."""
    inputs = find_inputs(images)
    location = redact(images, hidden="") if is_remote(images) else os.path.abspath(images)
    source = Source(inputs, Inventory.sort(inputs.entries(), inputs.is_same), location.rstrip("/"))
    problems = [entry for entry in islice(source.inventory.entries(), 1000) if entry.problem]
    if len(problems) == len(source.inventory):
        raise UserError("; ".join(_nothing_to_score(images, source, problems)))
    return source


def _nothing_to_score(images: str, source: Source, problems: list[Entry]) -> Iterator[str]:
    yield f"no images in {redact(images)!r}: {source.ignored} other files"
    if problems:
        yield f"{len(problems)} problems {[f'{entry.name}: {entry.problem}' for entry in problems[:3]]}"
    yield from source.describe_left_out(every=True)
    if source.inputs.left_out.others[NO_SUFFIX]:
        yield "or list them in a .txt file, which names files of any suffix"
    if source.inputs.left_out.others[TAR_SUFFIX] and isinstance(source.inputs, LocalFolder | RemoteFolder):
        yield "or give tar files by a pattern, as in 'FOLDER/*.tar'"
    if any(entry.problem.startswith("linked folder") for entry in problems):
        yield "name the folder that a link leads to, or list the files in a .txt file"


def find_inputs(images: str) -> Inputs:
    """Return the kind of inputs that a value of --images names. Raises UserError when there is none."""
    if is_remote(images):
        if _is_remote_pattern(images):
            return match_files(images)
        path = url_path(images)
        known = (*LIST_SUFFIXES, *TABLE_SUFFIXES, TAR_SUFFIX, *SUFFIXES)
        is_file = path.lower().endswith(known) or has_image_suffix(path)
        if is_file or (is_http(images) and path[-1] != "/"):
            return _one_file(images, path.rpartition("/")[0])
        return RemoteFolder(images.rstrip("/"))
    if os.path.isdir(images):
        return LocalFolder(images)
    if os.path.isfile(images):
        if os.path.splitext(images)[1].lower() != TAR_SUFFIX and (packed := look_into(images)):
            raise UserError(f"--images {images} is {packed}")
        return _one_file(images, os.path.dirname(images))
    if WILDCARDS.search(images):
        return match_files(images)
    raise UserError(f"--images {images!r} does not exist or is neither a folder nor a regular file")


def _is_remote_pattern(url: str) -> bool:
    """Return whether a URL stands for several files. [ may be part of a name, and comes first as that."""
    if is_http(url) or not WILDCARDS.search(url):
        return "{" in url
    return "[" not in url or not storage.exists(url)


def _one_file(path: str, folder: str) -> Inputs:
    """Return what a file or object holds, by its suffix: a list, a tar file, or else one image."""
    suffix = os.path.splitext(url_path(path))[1].lower()
    if suffix in LIST_SUFFIXES + TABLE_SUFFIXES:
        from serve.inputs.lists import ListedFiles  # what only lists need does not slow every start

        return ListedFiles(path, folder)
    return Files([path], folder)

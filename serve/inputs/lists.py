"""Images whose paths and URLs a text file or a CSV file lists."""

import csv
import os
import unicodedata
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import IO

from serve import storage
from serve.contract.archive import SUFFIX as TAR_SUFFIX
from serve.contract.errors import UserError, print_line
from serve.contract.image_column import find_image_columns
from serve.contract.image_files import SAMPLE_ROWS, ImageFiles
from serve.contract.listing import has_image_suffix
from serve.contract.tables import Table, TableRow, read_table
from serve.contract.text_encoding import open_text
from serve.contract.urls import is_remote, join_url, redact, url_path
from serve.inputs.base import Inputs, absolute
from serve.inputs.files import TABLE_SUFFIXES
from serve.inputs.inventory import Entry

MAX_LINE_BYTES, MOST_SHOWN = 1 << 16, 200
FROM_WHERE = "paths in a list begin at the root or in the list's own folder"
TAR_IN_A_LIST = "a tar file in a list: give one, or several by a pattern, as --images"


class ListedFiles(Inputs):
    """Relative paths are relative to the list's own folder."""

    def __init__(self, path: str, folder: str):
        super().__init__(folder)
        self.path = path
        base = redact(folder, hidden="") if is_remote(folder) else absolute(folder).rstrip("/")
        self.prefix = f"{base}/"

    def entries(self) -> Iterator[Entry]:
        is_table = url_path(self.path).lower().endswith(TABLE_SUFFIXES)
        return map(self._entry, (listed_in_table if is_table else listed_lines)(self.path))

    def _entry(self, name: str) -> Entry:
        if name.startswith("~/") and not is_remote(self.base):
            name = os.path.expanduser(name)
        problem = TAR_IN_A_LIST if url_path(name).lower().endswith(TAR_SUFFIX) else ""
        if is_remote(name) or is_remote(self.base):
            url = name if is_remote(name) else join_url(self.base, name)
            key = redact(url, hidden="").removeprefix(self.prefix)
            return Entry(redact(name, hidden=""), url, key, problem)
        key = absolute(os.path.join(self.base, name)).removeprefix(self.prefix)
        return Entry(name, "", unicodedata.normalize("NFC", key), problem)


def listed_lines(path: str) -> Iterator[str]:
    """Yield the lines of a text file, without their ends. Empty lines are passed over."""
    number, is_known = 0, is_remote(path)
    try:
        with open_text(_open(path), newline="\n") as file:  # a name may hold a carriage return
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES or "\0" in line:
                    raise UserError(f"{path}: line {number} is no path: is this a list of images?")
                name = line.removesuffix("\n").removesuffix("\r")
                if name.strip():
                    if number <= 2:  # the first one may be a heading
                        is_known = is_known or _is_path(path, number, name)
                    yield name
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number + 1} is not UTF-16 as its beginning is: {error}") from error


def _is_path(path: str, number: int, line: str) -> bool:
    """Return whether a line is a URL or the path of a file. Raises UserError when it is a comment, or only
    holds the path of a file or a name of an image, or begins in the current folder: all lines would."""
    folder = os.path.dirname(path)
    if is_remote(line) or os.path.lexists(os.path.join(folder, line)):
        return True
    parts = [line.replace("\\", "/"), line.strip(" \t\"'"), line.partition("\r")[0]]
    parts += [line.rstrip().rpartition(separator)[0] for separator in ",\t "] + [os.path.abspath(line)]
    found = [part for part in parts if part and os.path.isfile(os.path.join(folder, part))]
    if found or (
        not has_image_suffix(line) and (line.startswith("#") or any(map(has_image_suffix, parts)))
    ):
        hint = f", the path of a file is {found[0]!r}" if found else ""
        raise UserError(
            f"{path}: line {number}, {line[:MOST_SHOWN]!r}, is no path{hint}: each line must be one path,"
            f" with '/', and {FROM_WHERE}; the name of a table ends in .csv"
        )
    return False


def listed_in_table(path: str) -> Iterator[str]:
    """Yield the images that a table (CSV, JSON) lists in its column path, or else in that of images.

    Where folders train and test have images of the same names, those of test are taken. Raises UserError
    when no column names images, or several do.
    """
    with _open(path) as file:
        line = 1
        try:
            table = read_table(file, path)
            sample = list(islice(table.rows, SAMPLE_ROWS))
            at, path_of = _find_images(path, table, sample)
            for row in chain(sample, table.rows):
                line = row.line
                if not row.cells[at]:
                    raise UserError(f"{path}: line {line} has no path")
                yield path_of(row.cells[at])
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: what follows line {line} is not CSV: {error}") from error


def _find_images(path: str, table: Table, sample: list[TableRow]) -> tuple[int, Callable[[str], str]]:
    """Return the column of the images, and the function that makes paths of its cells."""
    named = table.find("path")
    if len(named) > 1:
        raise UserError(f"{path} has {len(named)} columns 'path' ({table.columns[:10]}): keep one")
    cells = [[row.cells[i] for row in sample] for i in range(len(table.columns))]
    urls = [i for i in range(len(cells)) if cells[i] and (is_remote(path) or all(map(is_remote, cells[i])))]
    urls = [i for i in urls if all(is_remote(cell) or has_image_suffix(cell) for cell in cells[i])]
    at = (named or urls or [0])[0]
    if (named or len(urls) == 1) and (is_remote(path) or at in urls or _are_files(path, cells[at])):
        return at, str
    files = ImageFiles(path, "test")
    found = named or (urls if is_remote(path) else find_image_columns(table, sample, files))
    if not found:
        _check_current_folder(path, cells)
    if len(found) != 1:
        which = "several columns may name images" if found else "no column is called 'path' or names images"
        raise UserError(f"{path}: {which} ({table.columns[:10]}): call that of the images 'path'")
    at = found[0]
    naming, count = files.locate([cell for cell in dict.fromkeys(cells[at]) if cell.strip()])
    if named and not count:
        _check_current_folder(path, [cells[at]])
        return at, str  # each is an error row later
    header = table.columns[at]
    if not table.headless and any(map(str.isdigit, header)) and files.find(header, naming):
        raise UserError(f"{path}: the first line names an image: write names of columns before it")
    print_line(f"{path}: images from the column {header!r}{naming.describe()}")
    return at, lambda cell: files.path_of(cell, naming)


def _check_current_folder(path: str, cells: list[list[str]]) -> None:
    """Raise UserError when a first cell is the path of a file from the current folder."""
    for cell in (column[0] for column in cells if column):
        if os.path.isfile(cell) and not is_remote(path):
            raise UserError(
                f"{path}: {cell!r} is a file in the current folder, but {FROM_WHERE}: move the list, or "
                f"write {os.path.abspath(cell)!r}"
            )


def _are_files(path: str, cells: list[str]) -> bool:
    """Return whether most cells are paths of files as they are; no folder is listed for that."""
    folder = os.path.dirname(path)
    return 2 * sum(os.path.isfile(os.path.join(folder, cell)) for cell in cells) >= len(cells)


def _open(path: str) -> IO[bytes]:
    return storage.download(path) if is_remote(path) else open(path, "rb")

"""Images whose paths and URLs a text file or a CSV file lists."""

import codecs
import csv
import io
import os
import unicodedata
from collections.abc import Iterator
from typing import IO

from serve import storage
from serve.contract.archive import file_stamp
from serve.contract.errors import UserError
from serve.contract.files import expand_home
from serve.contract.images import read_image_file
from serve.contract.listing import has_image_suffix
from serve.contract.urls import is_remote, join_url, redact, url_path
from serve.inputs.base import Inputs
from serve.inputs.files import absolute, is_same_file
from serve.inputs.inventory import Entry

LIST_SUFFIXES = (".txt", ".lst")
CSV_SUFFIX = ".csv"
MAX_LINE_BYTES = 1 << 16


class ListedFiles(Inputs):
    """Relative paths are relative to the list's own folder."""

    def __init__(self, path: str, folder: str):
        super().__init__()
        self.path, self.folder = path, folder
        base = redact(folder, hidden="") if is_remote(folder) else absolute(folder).rstrip("/")
        self.prefix = f"{base}/"

    def entries(self) -> Iterator[Entry]:
        is_csv = url_path(self.path).lower().endswith(CSV_SUFFIX)
        return map(self._entry, (listed_in_csv if is_csv else listed_lines)(self.path))

    def _entry(self, name: str) -> Entry:
        if name.startswith("~/") and not is_remote(self.folder):
            name = expand_home(name)
        if is_remote(name) or is_remote(self.folder):
            url = name if is_remote(name) else join_url(self.folder, name)
            return Entry(redact(name, hidden=""), url, redact(url, hidden="").removeprefix(self.prefix))
        key = absolute(os.path.join(self.folder, name)).removeprefix(self.prefix)
        return Entry(name, key=unicodedata.normalize("NFC", key))

    def read(self, entry: Entry) -> bytes:
        if entry.location:
            return storage.read_object(entry.location)
        return read_image_file(os.path.join(self.folder, entry.name))

    def stamp(self, entry: Entry) -> str:
        return "" if entry.location else file_stamp(os.path.join(self.folder, entry.name))

    def is_same(self, one: Entry, other: Entry) -> bool:
        return is_same_file(self.folder, one, other)


def listed_lines(path: str) -> Iterator[str]:
    """Yield the lines of a text file, without their ends. Empty lines are passed over."""
    number = 0
    try:
        with _open_text(path) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES or "\0" in line:
                    raise UserError(f"{path}: line {number} is no path: is this a list of images?")
                if name := line.removesuffix("\n").removesuffix("\r"):
                    if number == 1:
                        _check_first(path, name)
                    yield name
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number + 1} is not UTF-16 as its beginning is: {error}") from error


def _check_first(path: str, line: str) -> None:
    """Raise UserError when the first line is a comment, or holds the path of a file: all lines would."""
    folder = os.path.dirname(path)
    if is_remote(path) or is_remote(line) or os.path.lexists(os.path.join(folder, line)):
        return
    parts = [line.replace("\\", "/"), line.strip(" \t\"'")]
    parts += [line.rstrip().rpartition(separator)[0] for separator in ",\t "]
    found = [part for part in parts if part and os.path.isfile(os.path.join(folder, part))]
    if found or (line.startswith("#") and not has_image_suffix(line)):
        hint = f", the path of a file is {found[0]!r}" if found else ""
        raise UserError(
            f"{path}: line 1, {line!r}, is no path{hint}: write one path a line and nothing else, with /"
        )


def listed_in_csv(path: str) -> Iterator[str]:
    """Yield the column path of a CSV file."""
    with _open_text(path) as file:
        reader = csv.reader(file, strict=True)  # else a quote that is left open takes all that follows
        try:
            columns = [name.strip() for name in next(reader, [])]
            if "path" not in columns:
                columns = ["path" if name.casefold() == "path" else name for name in columns]
            if columns.count("path") != 1:
                count = columns.count("path") or "no"
                raise UserError(
                    f"{path}: {count} column 'path' among {columns[:10]}; it needs one, and commas between "
                    "columns"
                )
            at = columns.index("path")
            for row in reader:
                if row and (len(row) <= at or not row[at]):
                    raise UserError(f"{path}: line {reader.line_num} has no path")
                if row:
                    yield row[at]
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: line {reader.line_num} is not CSV: {error}") from error


def _open_text(path: str) -> IO[str]:
    """UTF-8, with what is none of it kept as it is, or UTF-16. Lines end with a newline alone: a name may
    hold a carriage return."""
    file = storage.download(path) if is_remote(path) else open(path, "rb")  # noqa: SIM115
    encoding = _encoding(file.read(2))
    file.seek(0)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    return io.TextIOWrapper(file, encoding, errors, newline="\n")


def _encoding(head: bytes) -> str:
    if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    if len(head) == 2 and (head[0] == 0) != (head[1] == 0):  # of ASCII in UTF-16 each other byte is 0
        return "utf-16-be" if head[0] == 0 else "utf-16-le"
    return "utf-8-sig"

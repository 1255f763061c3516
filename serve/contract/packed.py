"""Compressed tar files and archives of other kinds, named with the command that makes them readable.

Only plain tar files are read in place: the members of a compressed one cannot be read one by one.
"""

import os
import shlex
from typing import IO, NamedTuple

from serve.contract.command_line import command

PARQUET = f"{command('train/data/convert_parquet.py')} {{source}} --output {{folder}}"
LONGEST_BEGINNING = 10  # bytes


class Packed(NamedTuple):
    """A kind of file that holds images which are not read from it."""

    kind: str
    beginning: bytes
    suffixes: tuple[str, ...]
    command: str
    """{source} is the file, {plain} the decompressed one, {folder} a folder for what is in it."""


PACKED = (
    Packed("compressed with gzip", b"\x1f\x8b\x08", (".gz", ".tgz"), "gunzip -c < {source} > {plain}"),
    Packed(
        "compressed with bzip2",
        b"BZh",
        (".bz2", ".tbz", ".tbz2"),
        "bunzip2 -c < {source} > {plain}",
    ),
    Packed("compressed with xz", b"\xfd7zXZ\0", (".xz", ".txz"), "xz -dc < {source} > {plain}"),
    Packed("compressed with zstd", b"\x28\xb5\x2f\xfd", (".zst", ".tzst"), "zstd -dc < {source} > {plain}"),
    Packed("compressed with lz4", b"\x04\x22\x4d\x18", (".lz4",), "lz4 -dc < {source} > {plain}"),
    Packed("a zip archive", b"PK\x03\x04", (".zip",), "unzip {source} -d {folder}"),
    Packed("a 7z archive", b"7z\xbc\xaf\x27\x1c", (".7z",), "7z x {source} -o{folder}"),
    Packed("a rar archive", b"Rar!\x1a\x07", (".rar",), "unrar x {source} {folder}/"),
    Packed("a Parquet file", b"PAR1", (".parquet",), PARQUET),
)
SUFFIXES = tuple(suffix for packed in PACKED for suffix in packed.suffixes)
SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")  # most are zip archives, too


def packed_by_name(name: str) -> Packed | None:
    return next((packed for packed in PACKED if name.lower().endswith(packed.suffixes)), None)


def packed_by_content(data: bytes) -> Packed | None:
    """Return the kind of a file by its first LONGEST_BEGINNING bytes; None: none of them."""
    for packed in PACKED:
        if data.startswith(packed.beginning):
            # BZh may begin a text, but not with a level and the magic number of a block or of the end
            if packed.beginning == b"BZh" and data[4:7] not in (b"1AY", b"\x17rE"):
                continue
            return packed
    return None


def look_into(path: str | os.PathLike[str]) -> str:
    """Return `describe_packed` of a local file by its content; "" for any other file."""
    with open(path, "rb") as file:
        return describe_open(file, os.fspath(path))


def describe_open(file: IO[bytes], path: str) -> str:
    """Return `describe_packed` of an open file by its first bytes, or that it is a spreadsheet by its name;
    "" for any other file."""
    if path.lower().endswith(SPREADSHEETS):
        return "a spreadsheet: save it as CSV (UTF-8)"
    file.seek(0)
    packed = packed_by_content(file.read(LONGEST_BEGINNING))
    return describe_packed(packed, path) if packed else ""


def describe_packed(packed: Packed, path: str) -> str:
    """Return what the file is and the command that makes it readable, as in "a zip archive: unzip ..."."""
    suffix = next((s for s in packed.suffixes if path.lower().endswith(s)), "")
    stem, own = (path[: -len(suffix)], "") if suffix else os.path.splitext(path)
    if not suffix:
        plain = f"{stem}-plain{own or '.tar'}"
    else:  # photo.jpg.gz, list.csv.gz, photos.tar.gz, and photos.tgz
        plain = stem if os.path.splitext(stem)[1] and suffix[:2] != ".t" else f"{stem}.tar"
    folder = f"{stem}-shards" if packed.command == PARQUET else stem
    names = {"source": path, "plain": plain, "folder": folder}
    quoted = {name: shlex.quote(value) for name, value in names.items()}
    return f"{packed.kind}: {packed.command.format(**quoted)}"

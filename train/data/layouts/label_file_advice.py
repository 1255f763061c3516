"""Commands that make a label file of a CSV file which cannot be read as one."""

import os
import shlex
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from serve.contract.formats import IMAGE_SUFFIXES
from serve.contract.listing import has_image_suffix
from train.data.text_encoding import ENCODINGS, is_undecoded, likely_encodings, reads_as, text_encoding

DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}
MOST_FOLDERS = 100  # in which the images are sought


def cure_for_columns(path: Path, columns: Sequence[str], first: Sequence[str]) -> str:
    """Return the cure for a file without the columns path and label; `first` are its first row's cells."""
    if not columns:
        return ""
    for delimiter, name in DELIMITERS.items() if len(columns) == 1 else ():
        if delimiter in columns[0]:
            program = f"csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={delimiter!r}))"
            command = f'python3 -c "import csv, sys; {program}"'
            return f"; its columns are separated by {name}; {_run(path, command)}"
    if any(map(has_image_suffix, columns)):  # the first line is a row
        command = f"sed '1i {_guessed(columns)}'"
    else:
        command = f"sed '1s/.*/{_guessed(first)}/'"
    if len(columns) != 2:
        return "; call the column of the images path, that of their classes label"
    return f"; {_run(path, command)}"


def _guessed(row: Sequence[str]) -> str:
    return "label,path" if len(row) > 1 and has_image_suffix(row[1]) else "path,label"


def cure_for_encoding(path: Path, texts: list[bytes]) -> str:
    """Return the cure for a file with these texts, which are not UTF-8."""
    likely = likely_encodings(texts)
    if not likely:
        return f"{texts[0]!r} {reads_as(likely)}: save the file as UTF-8"
    return f"{texts[0]!r} {reads_as(likely)}; {_run(path, f'iconv -f {next(iter(likely))} -t utf-8')}"


def cure_for_paths(path: Path, columns: Sequence[str], images: Sequence[str]) -> str:
    """Return the cure if no image exists, but a file of nearly the first one's name does; else ""."""
    if not images or any(os.path.lexists(path.parent / image) for image in images):
        return ""
    for other, command in _other_paths(path.parent, images[0], 1 + list(columns).index("path")):
        if os.path.isfile(path.parent / other):
            return f"the file {images[0]!r} does not exist, {other!r} does; {_run(path, command)}"
    return ""


def _other_paths(folder: Path, image: str, column: int) -> Iterator[tuple[str, str]]:
    """Yield (another path, the command that changes all paths of the column alike)."""
    cell = f"${column}"
    yield image.replace("\\", "/"), "tr '\\\\' /"
    yield image.strip(), _awk(f'gsub(/^[ \\t]+|[ \\t]+$/, "", {cell})')
    for form in ("NFC", "NFD"):
        program = f"import sys, unicodedata as u; sys.stdout.write(u.normalize('{form}', sys.stdin.read()))"
        yield unicodedata.normalize(form, image), f'python3 -c "{program}"'
    if is_undecoded(image):
        for encoding in ENCODINGS:
            try:
                yield os.fsencode(image).decode(encoding), f"iconv -f {encoding} -t utf-8"
            except UnicodeDecodeError:
                continue
    folders = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    for prefix in ("", *(f"{name}/" for name in sorted(folders)[:MOST_FOLDERS])):
        for suffix in ("", *sorted(IMAGE_SUFFIXES), *sorted(map(str.upper, IMAGE_SUFFIXES))):
            yield f"{prefix}{image}{suffix}", _awk(f'{cell} = "{prefix}" {cell} "{suffix}"')


def _awk(change: str) -> str:
    """Return a command that changes all lines but the first, and removes the line ends of Windows."""
    return "awk -F, -v OFS=, " + shlex.quote(f'{{sub(/\\r$/, "")}} NR > 1 {{{change}}} 1')


def _run(path: Path, command: str) -> str:
    file, new = shlex.quote(str(path)), shlex.quote(str(path.with_name(f"{path.stem}.new{path.suffix}")))
    with path.open("rb") as text:
        encoding = text_encoding(text.read(4))
    if encoding == "utf-8-sig":
        return f"run: {command} < {file} > {new}"
    encoding = encoding.replace("16-", "16")  # as iconv calls it
    return f"run: iconv -f {encoding} -t utf-8 {file} | {command} > {new}"

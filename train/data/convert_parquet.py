"""Convert image data sets in Parquet files, such as Hugging Face's, to tar shards for --data.

    python train/data/convert_parquet.py FOLDER --split train --output shards/train

FOLDER is a folder (searched recursively) or a file. Images are stored as their bytes are, beside
their label: 000000000.jpg and 000000000.cls, in shards of a WebDataset.
"""

import argparse
import io
import json
import os
import re
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

if not __package__:  # started by path: the repository root, not train/data/, belongs on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from serve.contract.installation import require

require("parquet", "pyarrow")

import pyarrow as pa
from pyarrow import parquet

from serve.contract.command_line import CommandLine, Number
from serve.contract.errors import UserError
from serve.contract.image_files import PART, part_of, words
from serve.contract.images import open_image
from serve.contract.interrupts import end_on_signal
from serve.contract.listing import has_image_suffix
from train.data.labels import listed, normal

SUFFIX = ".parquet"
# train-00000-of-00002.parquet; of Hugging Face's own conversion, train/0000.parquet
SPLIT = re.compile(r"(?P<split>.+?)-\d+-of-\d+(?:-[0-9a-f]+)?")
ROWS = 64  # made Python's at a time; Arrow holds a row group
BUFFER_BYTES = 1 << 20  # read of a column at a time
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PPM": ".ppm", "HEIF": ".heic"}
UNLABELLED = -1  # Hugging Face's ClassLabel of a row without one


@dataclass(frozen=True)
class ImageColumns:
    """Where images and labels of a Parquet file are."""

    image: str
    label: str
    class_names: tuple[str, ...] = ()
    """By number, as the file's schema has them; empty: the labels are the values."""

    def label_of(self, value: Any, where: str) -> str:
        """Return a row's label. Raises UserError when it has none."""
        if value is None or (self.class_names and value == UNLABELLED):
            raise UserError(f"{where} has no label in column {self.label!r}: convert a split with labels")
        if isinstance(value, list | tuple | dict):
            raise UserError(
                f"{where}: {value!r:.60} in column {self.label!r} is no single label, and each image needs "
                "exactly one: name another column by --label-column"
            )
        if isinstance(value, bytes):
            value = _decoded(value, f"{where}: the label in column {self.label!r}")
        if not self.class_names:
            label = normal(str(value))
        elif 0 <= value < len(self.class_names):
            label = self.class_names[value]
        else:
            raise UserError(f"{where}: label {value} is none of 0..{len(self.class_names) - 1}")
        if not label:
            raise UserError(f"{where}: the label in column {self.label!r} is empty")
        return label


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{what}, {data[:60]!r}, is not UTF-8: convert the column to text") from error


def find_files(source: str, split: str) -> list[Path]:
    """Return the Parquet files of a split, sorted; "" stands for the only one.

    Raises UserError when there are no files, or the split is none of those in their names and folders'.
    """
    root = Path(source)
    paths = [root] if root.is_file() else sorted(root.rglob(f"*{SUFFIX}"))
    if not paths:
        raise UserError(f"{source!r} names no {SUFFIX} file: give a folder or a file")
    splits: defaultdict[str, list[Path]] = defaultdict(list)
    for path in paths:
        splits[_split_of(path, root)].append(path)
    unclear = split not in splits if split else len(splits) > 1
    if unclear:
        names = [repr(name) if name else "files without a split in their names" for name in sorted(splits)]
        raise UserError(
            f"--split {split!r} must be one of those in the names of files and folders: {', '.join(names)}"
        )
    return splits[split] if split else next(iter(splits.values()))


def _split_of(path: Path, root: Path) -> str:
    """Return the split that the file's name holds, or else that of a folder below `root`; "" for none."""
    found = SPLIT.fullmatch(path.stem)
    name = found["split"] if found else path.parent.name if path.stem.isdigit() else ""
    if part_of(name):
        return name
    inside = path.relative_to(root).parts or (path.name,)
    return next((word for each in reversed(inside) for word in words(each) if PART.fullmatch(word)), name)


def find_columns(path: Path, image: str = "", label: str = "") -> ImageColumns:
    """Return the columns of a file; `image` and `label` name them where several could be meant.

    Raises:
        UserError: there is none, or several could be meant; the message holds the flag.
    """
    schema = _read(path).schema_arrow
    features = _features(schema)
    structs = [field.name for field in schema if _holds_bytes(field.type)]
    image = _choose("image", image, structs or [f.name for f in schema if _is_binary(f.type)], path, schema)
    named = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    plain = [f.name for f in schema if f.name != image and _is_label(f.type)]
    if not named and "label" in plain:
        plain = ["label"]
    label = _choose("label", label, named or plain, path, schema)
    names = features.get(label, {}).get("names") or ()
    return ImageColumns(image, label, tuple(map(str, names)))


def _choose(kind: str, given: str, found: list[str], path: Path, schema: pa.Schema) -> str:
    columns = ", ".join(f"{field.name!r} ({field.type})" for field in schema)
    if given and given not in schema.names:
        raise UserError(f"--{kind}-column {given!r} is not a column of {path}, which has {columns}")
    if not given and len(found) != 1:
        what = f"several columns that may hold the {kind}" if found else f"no column that holds the {kind}"
        raise UserError(f"{path} has {what}: give --{kind}-column NAME, one of {columns}")
    return given or found[0]


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return what Hugging Face's metadata hold of each column; {} without any."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: each for name, each in features.items() if isinstance(each, dict)}


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind)) and any(f.name == "bytes" and _is_binary(f.type) for f in kind)


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _read(path: Path) -> parquet.ParquetFile:
    try:
        return parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as a Parquet file: {error}") from error


def samples(path: Path, columns: ImageColumns) -> Iterator[tuple[bytes, str, str]]:
    """Yield (the image's bytes, suffix, label) of each row.

    Raises:
        UserError: the file has other columns or names of classes; a row has no image or no label: the
            message names it, counted from 0.
    """
    number = 0
    file = _read(path)
    if (own := find_columns(path, columns.image, columns.label)) != columns:
        raise UserError(
            f"{path} has other names of classes ({listed(own.class_names)}) than the first file "
            f"({listed(columns.class_names)}): a number would stand for two classes. Convert it alone"
        )
    try:
        for batch in file.iter_batches(ROWS, columns=[columns.image, columns.label]):
            for row in batch.to_pylist():
                where = f"{path} row {number}"
                data, name = _image(row[columns.image], where)
                yield data, _suffix(name, data), columns.label_of(row[columns.label], where)
                number += 1
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged after row {number}: {error}") from error


def _image(cell: Any, where: str) -> tuple[bytes, str]:
    """Return the bytes of a cell and the name of the file that they were, or ""."""
    data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, "")
    if not isinstance(data, bytes) or not data:
        only = f", only the path {name!r}: give the images as files, or embed them" if name else ""
        raise UserError(f"{where} has no bytes of an image{only}")
    return data, name or ""


def _suffix(name: str, data: bytes) -> str:
    if has_image_suffix(name):
        return os.path.splitext(name)[1].lower()
    try:
        with open_image(data) as image:
            kind = image.format or "JPEG"
    except Exception:  # Pillow raises nearly anything on damaged bytes: training names the file
        kind = "JPEG"
    return SUFFIXES.get(kind, f".{kind.lower()}")


def write_shards(
    paths: Sequence[Path], columns: ImageColumns, output: Path, shard_bytes: int
) -> Counter[str]:
    """Write shards of about `shard_bytes` into the new folder `output`, whole or not at all; return how
    many images each label has. The same rows give the same bytes."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {str(output)!r} exists and is not empty: name a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name[:50]}.", dir=output.parent) as scratch:
        shards = Path(scratch) / "shards"  # unlike scratch itself, readable by other users
        shards.mkdir()
        counts = _write(paths, columns, shards, shard_bytes)
        shards.rename(output)
    return counts


def _write(paths: Sequence[Path], columns: ImageColumns, folder: Path, shard_bytes: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    rows = (row for path in paths for row in samples(path, columns))
    shards = (folder / f"{number:05}.tar" for number in count())
    while (first := next(rows, None)) is not None:
        with tarfile.open(next(shards), "w", format=tarfile.GNU_FORMAT) as shard:
            for data, suffix, label in chain([first], rows):
                key = f"{counts.total():09}"
                for name, content in ((key + suffix, data), (f"{key}.cls", label.encode())):
                    member = tarfile.TarInfo(name)  # without time and owner
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
                counts[label] += 1
                if shard.offset >= shard_bytes:
                    break
    if not counts:
        raise UserError(f"{paths[0]} and the files beside it hold no rows")
    return counts


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine("train/data/convert_parquet.py", __doc__, "SOURCE --output FOLDER [options]")
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder of .parquet files, or one file")
    add("--output", type=Path, required=True, help="new folder for the tar shards")
    add("--split", default="", help="which part, where the file names hold several: train, validation, ...")
    add("--image-column", default="", help="(default: the one that holds bytes of images)")
    add("--label-column", default="", help="(default: the ClassLabel, `label`, or the only other column)")
    add("--shard-mb", type=Number(int, 1), default=256, help="size of a shard")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for unusable arguments or files."""
    args = build_parser().parse_args(argv)
    try:
        paths = find_files(args.source, args.split)
        columns = find_columns(paths[0], args.image_column, args.label_column)
        names = "the schema's names" if columns.class_names else "its values"
        print(f"{len(paths)} files; images: column {columns.image!r}; labels: {columns.label!r}, {names}")
        counts = write_shards(paths, columns, args.output, args.shard_mb << 20)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{counts.total()} images of {len(counts)} classes\nnext: --data {args.output}")
    return 0


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())

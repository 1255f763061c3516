"""Part files to one file, row by row, checked against their manifests on the way."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from serve.contract.errors import UserError
from serve.contract.files import file_sha256
from serve.inputs.inventory import NamesDigest
from serve.outputs.parquet import import_pyarrow
from serve.shards import Manifest

MAX_FIELD = 1 << 24  # a name may be longer than the csv module's own limit


def join(parts: Sequence[Path], manifests: Sequence[Manifest], file: IO[bytes]) -> str:
    """Copy the rows of all parts into `file`; the digest of their names. Memory is one row (group).

    Raises UserError when a part is not what its manifest says, or its format cannot be joined.
    """
    format_name = manifests[0].job.settings.get("format")  # a piece may have any suffix
    if format_name not in JOINERS:
        raise UserError(f"{parts[0]}: the format {format_name!r} cannot be joined")
    before = csv.field_size_limit(MAX_FIELD)
    try:
        return _join(parts, manifests, JOINERS[format_name](file))
    finally:
        csv.field_size_limit(before)


def _join(parts: Sequence[Path], manifests: Sequence[Manifest], joiner: "_Joiner") -> str:
    names = NamesDigest()
    for part, manifest in zip(parts, manifests, strict=True):
        if file_sha256(part) != manifest.sha256:
            raise UserError(f"{part} is not the file that its manifest describes: score it again")
        rows = 0
        for name in joiner.add(part):
            names.add(name)
            rows += 1
        if rows != manifest.rows:
            raise UserError(f"{part} has {rows} rows, its manifest says {manifest.rows}")
    joiner.close()
    return names.hexdigest()


class _Joiner(Protocol):
    def __init__(self, file: IO[bytes]): ...

    def add(self, part: Path) -> Iterator[str]:
        """Copy the rows of a part; their names."""

    def close(self) -> None: ...


class _Csv:
    def __init__(self, file: IO[bytes]):
        self.file = file
        self.header = b""

    def add(self, part: Path) -> Iterator[str]:
        lines: list[bytes] = []  # of the record that is being read: a name may hold line ends

        def read(file: IO[bytes]) -> Iterator[str]:
            for line in file:
                lines.append(line)
                yield line.decode()

        with part.open("rb") as file:
            for number, record in enumerate(csv.reader(read(file))):
                raw = b"".join(lines)
                lines.clear()
                if number:
                    self.file.write(raw)
                    yield record[0]
                elif not self.header:
                    self.header = raw
                    self.file.write(raw)
                elif raw != self.header:
                    raise UserError(f"{part} has other columns than the parts before it")

    def close(self) -> None:
        pass


class _Jsonl:
    def __init__(self, file: IO[bytes]):
        self.file = file

    def add(self, part: Path) -> Iterator[str]:
        with part.open("rb") as file:
            for line in file:
                self.file.write(line)
                yield json.loads(line)["path"]

    def close(self) -> None:
        pass


class _Parquet:
    def __init__(self, file: IO[bytes]):
        self.file = file
        self.writer: Any = None

    def add(self, part: Path) -> Iterator[str]:
        _, parquet = import_pyarrow()
        with parquet.ParquetFile(part) as rows:
            if self.writer is None:
                self.writer = parquet.ParquetWriter(self.file, rows.schema_arrow, compression="zstd")
            elif rows.schema_arrow != self.writer.schema:
                raise UserError(f"{part} has other columns than the parts before it")
            for group in range(rows.num_row_groups):
                table = rows.read_row_group(group)
                self.writer.write_table(table)
                yield from table["path"].to_pylist()

    def close(self) -> None:
        self.writer.close()


JOINERS: dict[str, type[_Joiner]] = {"csv": _Csv, "jsonl": _Jsonl, "parquet": _Parquet}

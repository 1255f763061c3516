"""Rows as Parquet, with CSV's columns, typed, and embedding list<float>: the extra parquet.

pyarrow is imported on first use only.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from serve.contract.errors import UserError
from serve.contract.installation import how_to_install
from serve.inputs.inventory import printable
from serve.outputs.layout import Format, Joiner, Layout, Row, Writer, are_columns

ROW_GROUP_BYTES = 4 << 20  # of cells held in memory
MAX_ROW_GROUP = 20_000


def import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"--format parquet needs pyarrow ({error}): {how_to_install('parquet')}, or use jsonl"
        ) from error
    return pyarrow, pyarrow.parquet


class ParquetWriter(Writer):
    """Writes row groups of a few megabytes."""

    def __init__(self, file: IO[bytes], layout: Layout):
        pa, parquet = import_pyarrow()
        self.pa, self.layout = pa, layout
        kinds = {"label": pa.string(), "probability": pa.float32()}
        columns = [(printable(name), kinds[name.partition("_")[0]]) for name in layout.columns]
        vector = [("embedding", pa.list_(pa.float32()))] if layout.embeddings else []
        self.schema = pa.schema(
            [("path", pa.string()), *kinds.items(), *columns, *vector, ("error", pa.string())]
        )
        self.parquet = parquet.ParquetWriter(file, self.schema, compression="zstd")
        self.rows: list[Row] = []
        self.bytes = 0

    def write(self, row: Row) -> None:
        self.rows.append(row)
        arrays = (row.probabilities, row.embedding)
        self.bytes += 200 + sum(array.nbytes for array in arrays if array is not None)
        if len(self.rows) == MAX_ROW_GROUP or self.bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        columns = zip(*map(self._values, self.rows), strict=True)
        arrays = [self.pa.array(c, f.type) for c, f in zip(columns, self.schema, strict=True)]
        self.parquet.write_table(self.pa.table(arrays, self.schema))
        self.rows, self.bytes = [], 0

    def _values(self, row: Row) -> list[Any]:
        if row.probabilities is None:
            values: list[Any] = [None] * (len(self.schema) - 2)
        else:
            likeliest = self.layout.likeliest(row.probabilities)
            pairs = [(printable(self.layout.class_names[i]), row.probabilities[i]) for i in likeliest]
            ranked = [value for pair in pairs for value in pair]
            values = ranked if self.layout.top_k else [*ranked, *row.probabilities]
            if self.layout.embeddings:
                values.append(row.embedding)
        return [printable(row.path), *values, printable(row.error) or None]

    def close(self) -> None:
        if self.rows:
            self._flush()
        self.parquet.close()


class ParquetJoiner(Joiner):
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


def begins_as_parquet(file: IO[bytes]) -> bool:
    if file.read(4) != b"PAR1":
        return False
    try:
        pyarrow, parquet = import_pyarrow()
    except UserError:  # then it is not replaced by another format either
        return False
    try:
        file.seek(0)
        return are_columns(parquet.read_schema(file).names)
    except (OSError, pyarrow.ArrowException):
        return False


PARQUET = Format(
    "parquet",
    ".parquet",
    ParquetWriter,
    begins_as_parquet,
    open_joiner=ParquetJoiner,
    embeddings=True,
    check_installed=import_pyarrow,
)

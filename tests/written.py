"""For tests of what is written: rows, and a file of them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from serve.contract.files import atomic_writer
from serve.outputs.layout import Layout, Row
from serve.outputs.writers import open_writer


def row_of(path: str, *probabilities: float) -> Row:
    return Row(path, np.array(probabilities, np.float32))


ROWS = [row_of("a.jpg", 0.125, 0.5, 0.375), Row("b.jpg", error="truncated")]


def write(path: Path, format_name: str, rows: Iterable[Row], layout: Layout) -> Path:
    with atomic_writer(path) as file:
        writer = open_writer(format_name, file, layout)
        for row in rows:
            writer.write(row)
        writer.close()
    return path

"""For tests of what is written: rows, and a file of them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from serve.contract.files import atomic_write
from serve.outputs.formats import FORMATS
from serve.outputs.layout import Layout, Row


def row_of(path: str, *probabilities: float) -> Row:
    return Row(path, np.array(probabilities, np.float32))


STRANGE = ["a b.jpg", "a,b.jpg", 'a"b.jpg', "a\nb.jpg", "a\r\nb.jpg", "a\rb.jpg", "고양이.jpg", "=1+1.jpg"]
ROWS = [row_of("a.jpg", 0.125, 0.5, 0.375), Row("b.jpg", error="truncated")]


def write(path: Path, format_name: str, rows: Iterable[Row], layout: Layout) -> Path:
    with atomic_write(path) as file:
        writer = FORMATS[format_name].open_writer(file, layout)
        for row in rows:
            writer.write(row)
        writer.close()
    return path

"""JSON Lines read back as what was written."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from serve_model import CLASS_NAMES
from written import ROWS, write

from serve.outputs.layout import Layout, Row


def json_rows(tmp_path: Path, rows: Iterable[Row], layout: Layout) -> list[dict[str, Any]]:
    lines = write(tmp_path / "out.jsonl", "jsonl", rows, layout).read_bytes().split(b"\n")
    assert lines.pop() == b""
    return [json.loads(line) for line in lines]


def test_json_lines(tmp_path: Path) -> None:
    good, bad = json_rows(tmp_path, ROWS, Layout(CLASS_NAMES))
    assert good == {
        "path": "a.jpg",
        "label": "green",
        "probability": 0.5,
        "probabilities": {"red": 0.125, "green": 0.5, "blue": 0.375},
        "error": None,
    }
    assert bad == {**dict.fromkeys(good), "path": "b.jpg", "error": "truncated"}


def test_json_lines_of_the_likeliest_classes_with_embeddings(tmp_path: Path) -> None:
    rows = [replace(ROWS[0], embedding=np.array([1.5, -2e-20], np.float32)), ROWS[1]]
    good, bad = json_rows(tmp_path, rows, Layout(CLASS_NAMES, 2, embeddings=True))
    assert good["top"] == [{"label": "green", "probability": 0.5}, {"label": "blue", "probability": 0.375}]
    assert good["embedding"] == [1.5, -2e-20]
    assert (bad["top"], bad["embedding"]) == (None, None)

"""Parquet has CSV's columns with types, and is written as rows come."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from serve_model import CLASS_NAMES
from written import ROWS, write

from serve.outputs.layout import Layout, Row
from serve.outputs.parquet import PARQUET


def test_parquet_has_csvs_columns_with_types(tmp_path: Path) -> None:
    rows = [replace(ROWS[0], embedding=np.array([1.5, 0.1], np.float32)), ROWS[1]]
    path = write(tmp_path / "out.parquet", "parquet", rows, Layout(CLASS_NAMES, embeddings=True))
    table = parquet.read_table(path)
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("path", "string"),
        ("label", "string"),
        *((name, "float") for name in ("probability", *(f"probability_{c}" for c in CLASS_NAMES))),
        ("embedding", "list<element: float>"),
        ("error", "string"),
    ]
    good, bad = table.to_pylist()
    assert list(good.values())[:-2] == ["a.jpg", "green", 0.5, 0.125, 0.5, 0.375]
    np.testing.assert_array_equal(np.array(good["embedding"], np.float32), rows[0].embedding)
    assert good["error"] is None
    assert bad == {**dict.fromkeys(good), "path": "b.jpg", "error": "truncated"}


def test_parquet_of_the_likeliest_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "out.parquet", "parquet", ROWS, Layout(CLASS_NAMES, 2))
    good, bad = parquet.read_table(path).to_pylist()
    assert list(good.values()) == ["a.jpg", "green", 0.5, "blue", 0.375, None]
    assert list(bad.values()) == ["b.jpg", None, None, None, None, "truncated"]


def test_parquet_is_written_in_row_groups_as_rows_come(tmp_path: Path) -> None:
    rows = [Row(f"{i}.jpg", np.full(100_000, 1e-5, np.float32)) for i in range(30)]
    with (tmp_path / "out.parquet").open("wb") as file:
        layout = Layout(tuple(map(str, range(100_000))), top_k=1)
        writer = PARQUET.open_writer(file, layout)
        for row in rows:
            writer.write(row)
        file.flush()
        assert Path(file.name).stat().st_size > 100
        writer.close()
    groups = parquet.ParquetFile(tmp_path / "out.parquet")
    assert groups.num_row_groups == 3
    assert groups.read()["path"].to_pylist() == [row.path for row in rows]


def test_without_pyarrow_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[parquet\]'"):
        PARQUET.check_installed()

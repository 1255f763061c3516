"""Shards scored apart and merged are what one process writes, byte for byte, or they are refused."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from serve_model import broken_files, build_model, colour_of, encode, solid

from serve import main as serve_main
from serve.contract.files import file_sha256
from serve.merge import main as merge_main
from serve.shards import manifest_path

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_IMAGES = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of odd names, some broken, and a folder that is not entered."""
    root = tmp_path_factory.mktemp("images")
    for number in range(NUM_IMAGES):
        (root / f"{number:03}.png").write_bytes(encode(solid(colour_of(number)), "PNG"))
    for name, (data, _) in broken_files().items():
        (root / f"{name[0]},\n{name}").write_bytes(data)
    (root / os.fsdecode(b"caf\xe9 \r.png")).write_bytes(encode(solid(colour_of(3)), "PNG"))
    (root / "020").symlink_to(".")
    return root


def score(model: Path, images: Path, *arguments: object) -> int:
    fixed = ("--model", model, "--images", images, "--batch-size", 4, "--workers", 2)
    return serve_main.main([str(part) for part in (*fixed, *arguments)])


def merge(folder: Path, output: Path) -> int:
    return merge_main([str(folder), "--output", str(output)])


def score_shards(model: Path, images: Path, folder: Path, count: int, *arguments: object) -> Path:
    for index in range(count):
        assert score(model, images, "--shard", f"{index}/{count}", "--output", folder, *arguments) == 0
    return folder


@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize(
    "options",
    [("csv",), ("csv", "--top-k", 2), ("jsonl",), ("csv", "--part-size", 5)],
    ids=lambda options: " ".join(map(str, options)),
)
def test_merged_shards_are_the_bytes_of_one_process(
    tmp_path: Path, model: Path, images: Path, count: int, options: tuple[object, ...]
) -> None:
    arguments = ("--format", *options)
    whole, merged = tmp_path / f"whole.{options[0]}", tmp_path / f"merged.{options[0]}"
    assert score(model, images, "--output", whole, *arguments[:4]) == 0
    folder = score_shards(model, images, tmp_path / "parts", count, *arguments)
    assert len(list(folder.iterdir())) == 2 * count  # a part and its manifest, and no hidden leftovers
    assert merge(folder, merged) == 0
    assert merged.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x.ndjson", ()),
        ("x", ()),
        ("X.CSV", ()),
        ("x.txt", ("--format", "csv")),
        ("x.csv", ("--format", "jsonl")),
    ],
)
def test_pieces_are_joined_by_their_format_whatever_the_name(
    tmp_path: Path, model: Path, images: Path, name: str, arguments: tuple[str, ...]
) -> None:
    whole, pieces = tmp_path / f"whole-{name}", tmp_path / name
    assert score(model, images, "--output", whole, *arguments) == 0
    assert score(model, images, "--output", pieces, *arguments, "--part-size", 8) == 0
    assert pieces.read_bytes() == whole.read_bytes()


def test_a_part_is_not_written_over(
    tmp_path: Path, model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = score_shards(model, images, tmp_path / "parts", 2)
    part = folder / "part-00000-of-00002.csv"
    before = part.read_bytes()
    assert merge(folder, part) == 2
    assert "--output" in capsys.readouterr().err
    link = tmp_path / "merged.csv"
    link.symlink_to(part)
    assert merge(folder, link) == 2
    assert "--output" in capsys.readouterr().err
    assert part.read_bytes() == before


def test_parquet_shards_hold_the_rows_of_one_process(tmp_path: Path, model: Path, images: Path) -> None:
    arguments = ("--format", "parquet")
    assert score(model, images, "--output", tmp_path / "whole.parquet", *arguments) == 0
    folder = score_shards(model, images, tmp_path / "parts", 3, *arguments, "--part-size", 10)
    assert merge(folder, tmp_path / "merged.parquet") == 0
    whole, merged = (parquet.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "merged"))
    assert whole.equals(merged)


# -- what is refused -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, model: Path, images: Path) -> Path:
    return score_shards(model, images, tmp_path_factory.mktemp("parts") / "csv", 3)


def edit_manifest(part: Path, **changes: Any) -> None:
    path = manifest_path(part)
    values = json.loads(path.read_text())
    for key, value in changes.items():
        (values["job"] if key in values["job"] else values)[key] = value
    path.write_text(json.dumps(values))


def edit_rows(part: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Also in the manifest: what is left to find it is the digest of all names."""
    part.write_bytes(b"".join(change(part.read_bytes().splitlines(keepends=True))))
    edit_manifest(part, sha256=file_sha256(part))


PART = "part-00001-of-00003.csv"
TAMPERING: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing part": (lambda f: (f / PART).unlink(), r"1 of 3 parts are missing \(1\)"),
    "a missing manifest": (lambda f: manifest_path(f / PART).unlink(), f"so {PART} is unfinished"),
    "another model": (lambda f: edit_manifest(f / PART, model_sha256="0"), "is of another model than"),
    "another list": (lambda f: edit_manifest(f / PART, inputs_sha256="0"), "is of another list of inputs"),
    "another total": (lambda f: edit_manifest(f / PART, total=1), "is of another number of inputs"),
    "other settings": (lambda f: edit_manifest(f / PART, settings={"top_k": 9}), "is of other settings"),
    "overlapping parts": (lambda f: edit_manifest(f / PART, first=8), "parts overlap: .* begins at row 8"),
    "a gap": (lambda f: edit_manifest(f / PART, first=60), "parts leave a gap"),
    "a damaged part": (
        lambda f: (f / PART).write_bytes(b"path\n"),
        "is not the file that its manifest describes",
    ),
    "a row too few": (lambda f: edit_rows(f / PART, lambda rows: rows[:-1]), "rows, its manifest says"),
    "a row too many": (lambda f: edit_rows(f / PART, lambda rows: [*rows, rows[-1]]), "rows, its manifest"),
    "two rows swapped": (
        lambda f: edit_rows(f / PART, lambda rows: [*rows[:-2], rows[-1], rows[-2]]),
        "are not the job's .* inputs in their order",
    ),
    "a row twice, another not": (
        lambda f: edit_rows(f / PART, lambda rows: [*rows[:-2], rows[-1], rows[-1]]),
        "are not the job's .* inputs in their order",
    ),
    "other columns": (
        lambda f: edit_rows(f / PART, lambda rows: [b"path,label\n", *rows[1:]]),
        "has other columns",
    ),
    "another column's name of the same length": (
        lambda f: edit_rows(f / PART, lambda rows: [rows[0].replace(b"_red", b"_rot"), *rows[1:]]),
        "has other columns",
    ),
    "parts of two jobs": (
        lambda f: shutil.copy(f / PART, f / "part-00001-of-00004.csv"),
        r"parts of several jobs: of 3 \(.csv\), of 4 \(.csv\)",
    ),
}


@pytest.mark.parametrize("tampering", TAMPERING)
def test_parts_that_do_not_fit_are_refused_and_nothing_is_written(
    tmp_path: Path, parts: Path, tampering: str, capsys: pytest.CaptureFixture[str]
) -> None:
    act, reason = TAMPERING[tampering]
    folder = shutil.copytree(parts, tmp_path / "parts")
    act(folder)
    (tmp_path / "out").mkdir()
    assert merge(folder, tmp_path / "out" / "merged.csv") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(reason, error), error
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_without_parts_and_another_suffix_are_refused(
    tmp_path: Path, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(tmp_path, tmp_path / "merged.csv") == 2
    assert "part-00000-of-00001.csv" in capsys.readouterr().err
    assert merge(tmp_path / "missing", tmp_path / "merged.csv") == 2
    assert merge(parts, tmp_path / "merged.jsonl") == 2
    assert ".csv" in capsys.readouterr().err


def test_inputs_that_changed_between_two_shards_are_found(
    tmp_path: Path, model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = shutil.copytree(images, tmp_path / "images", symlinks=True)
    assert score(model, images, "--shard", "0/2", "--output", tmp_path / "parts") == 0
    (images / "040.png").rename(images / "040b.png")
    assert score(model, images, "--shard", "1/2", "--output", tmp_path / "parts") == 0
    assert merge(tmp_path / "parts", tmp_path / "merged.csv") == 2
    assert "list of inputs" in capsys.readouterr().err


def test_merging_needs_no_onnxruntime(tmp_path: Path, parts: Path) -> None:
    script = REPOSITORY / "serve" / "merge.py"
    program = (
        "import runpy, sys\nsys.modules.update(onnxruntime=None, PIL=None)\n"
        f"sys.argv = ['merge.py', {str(parts)!r}, '--output', 'merged.csv']\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    total = NUM_IMAGES + len(broken_files()) + 2
    assert f"{total} rows" in done.stdout, done.stderr
    with (tmp_path / "merged.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.reader(file))) == total + 1

"""Parquet files of images become tar shards with the same bytes and labels, or an error names the row."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import REPOSITORY
from PIL import Image
from pyarrow import parquet
from train_data import settings

from serve.contract.errors import UserError
from serve.contract.images import read_image_file
from train.data import convert_parquet
from train.data.convert_parquet import find_files, main
from train.data.index import prepare_data
from train.data.layouts.registry import find_labels

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLASSES = {"_type": "ClassLabel", "names": ["cat", "dog"]}
NAMES = {b"huggingface": json.dumps({"info": {"features": {"label": CLASSES}}}).encode()}


def picture(seed: int, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8 + seed, 8), (10 * seed % 256, 90, 200)).save(buffer, form)
    return buffer.getvalue()


def cell(seed: int, path: str | None = None, form: str = "JPEG") -> dict[str, Any]:
    return {"bytes": picture(seed, form), "path": path}


def write(
    path: Path,
    columns: dict[str, Any],
    metadata: dict[bytes, bytes] | None = None,
    rows: int = 100,
) -> Path:
    arrays = {n: v if isinstance(v, pa.Array) else pa.array(v) for n, v in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(arrays).replace_schema_metadata(metadata), path, rows)
    return path


def images(*cells: Any) -> pa.Array:
    return pa.array(cells, IMAGE)


def converted(source: Path, output: Path, *flags: str) -> dict[str, str]:
    """SHARD.tar/MEMBER -> label"""
    assert main([str(source), "--output", str(output), *flags]) == 0
    return find_labels(output, "auto").labels


def refused(capsys: pytest.CaptureFixture[str], source: Path, *flags: str) -> str:
    output = source.parent / "refused"
    assert main([str(source), "--output", str(output), *flags]) == 2
    assert not output.exists()
    assert not list(source.parent.glob(".refused*"))
    return capsys.readouterr().err


def test_hugging_faces_rows_keep_their_bytes_and_get_the_names_of_the_schema(tmp_path: Path) -> None:
    cells = [
        cell(i, f"x.y/{i}.jpeg" if i % 2 else None, "PNG" if i % 4 == 0 else "JPEG") for i in range(12)
    ]
    for part in range(2):
        rows = cells[6 * part : 6 * part + 6]
        columns = {"image": images(*rows), "label": pa.array([i % 2 for i in range(6)])}
        write(tmp_path / "data" / f"train-0000{part}-of-00002.parquet", columns, NAMES, rows=2)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", columns, NAMES)
    labels = converted(tmp_path, tmp_path / "out", "--split", "train")
    assert list(labels.values()) == ["cat", "dog"] * 6
    assert [Path(name).suffix for name in labels][:3] == [".png", ".jpeg", ".jpg"]
    assert [read_image_file(tmp_path / "out" / name) for name in labels] == [
        each["bytes"] for each in cells
    ]
    data = prepare_data(settings(tmp_path, data=str(tmp_path / "out"), near_duplicates=False))
    assert data.train.class_names == ("cat", "dog")
    assert len(data.train) + len(data.val) == 12


def test_the_same_rows_give_the_same_bytes_in_shards_of_the_size(tmp_path: Path) -> None:
    noise = [{"bytes": bytes([i]) * 400_000, "path": "a.jpg"} for i in range(1, 7)]
    source = write(tmp_path / "x.parquet", {"image": images(*noise), "label": ["a", "b"] * 3})
    for name in ("one", "two"):
        converted(source, tmp_path / name, "--shard-mb", "1")
    shards = [sorted((tmp_path / name).iterdir()) for name in ("one", "two")]
    assert [shard.name for shard in shards[0]] == ["00000.tar", "00001.tar"]
    assert [shard.read_bytes() for shard in shards[0]] == [shard.read_bytes() for shard in shards[1]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([3, 10]), ["3", "10"]),
        (pa.array(["red fox", " owl "]), ["red fox", "owl"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
    ],
    ids=["numbers", "texts", "dictionary"],
)
def test_labels_without_names_are_the_values(tmp_path: Path, values: pa.Array, expected: list[str]) -> None:
    source = write(tmp_path / "x.parquet", {"pixels": [picture(1), picture(2)], "kind": values})
    assert list(converted(source, tmp_path / "out").values()) == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([[0, 3], [1]], r"row 0: \[0, 3\] in column 'kind'"),
        ([{"a": 1}, {"a": 2}], r"row 0: \{'a': 1\}"),
        ([b"red", b"caf\xe9"], "row 1: .*UTF-8"),
    ],
    ids=["list", "struct", "bytes"],
)
def test_a_label_that_is_no_single_text_or_number_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: list[Any], reason: str
) -> None:
    source = write(tmp_path / "x.parquet", {"image": images(cell(1), cell(2)), "kind": values})
    assert re.search(reason, refused(capsys, source, "--label-column", "kind"))


def test_bytes_of_a_label_are_its_text(tmp_path: Path) -> None:
    kinds = ["red", "caf\u00e9"]
    columns = {"image": images(cell(1), cell(2)), "kind": [kind.encode() for kind in kinds]}
    source = write(tmp_path / "x.parquet", columns)
    assert list(converted(source, tmp_path / "out", "--label-column", "kind").values()) == kinds


def test_several_columns_are_refused_until_a_flag_names_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"a": images(cell(1), cell(2)), "b": images(cell(3), cell(4)), "x": [0, 1], "y": ["p", "q"]}
    source = write(tmp_path / "x.parquet", columns)
    assert "--image-column" in refused(capsys, source)
    assert "--label-column" in refused(capsys, source, "--image-column", "b")
    assert "'z'" in refused(capsys, source, "--image-column", "z")
    labels = converted(source, tmp_path / "out", "--image-column", "b", "--label-column", "y")
    assert list(labels.values()) == ["p", "q"]
    assert read_image_file(tmp_path / "out" / next(iter(labels))) == picture(3)
    assert "--label-column" in refused(capsys, write(tmp_path / "n.parquet", {"image": images(cell(1))}))


@pytest.mark.parametrize(
    ("row", "label", "reason"),
    [
        (None, 0, "row 1 "),
        ({"bytes": None, "path": "cat/1.jpg"}, 0, r"row 1 .*'cat/1\.jpg'"),
        ({"bytes": b"", "path": None}, 0, "row 1 "),
        (cell(1), -1, "row 1 .*'label'"),
        (cell(1), None, "row 1 .*'label'"),
        (cell(1), 2, r"row 1: .*0\.\.1"),
    ],
)
def test_a_row_without_an_image_or_a_label_is_an_error_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, label: int | None, reason: str
) -> None:
    columns = {"image": images(cell(0), row), "label": pa.array([0, label], pa.int64())}
    message = refused(capsys, write(tmp_path / "x.parquet", columns, NAMES))
    assert re.search(reason, message)


def test_splits_are_in_the_names_and_never_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("default/train/0000", "default/test/0000", "b/validation-00000-of-00001-0a1b2c"):
        write(tmp_path / f"{name}.parquet", {"image": images(cell(1)), "label": [0]}, NAMES)
    for split, folder in (("validation", "b"), ("train", "train"), ("test", "test")):
        assert [path.parent.name for path in find_files(str(tmp_path), split)] == [folder]
    assert len(find_files(str(tmp_path / "default" / "train"), "")) == 1
    assert "--split" in refused(capsys, tmp_path)
    assert "'valid'" in refused(capsys, tmp_path, "--split", "valid")
    with pytest.raises(UserError, match="nothing"):
        find_files(str(tmp_path / "nothing"), "")


@pytest.mark.parametrize(
    "name", ["{}", "{}-0", "{}/part-0000-c0ffee.snappy", "{}/data-00000-of-00004", "{}_0/more/x"]
)
def test_a_split_is_in_the_name_of_a_file_or_of_a_folder_around_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    root = tmp_path / "val"
    columns = {"image": images(cell(1)), "label": [0]}
    files = {
        split: write(root / f"{name.format(split)}.parquet", columns, NAMES) for split in ("test", "train")
    }
    assert "'test', 'train'" in refused(capsys, root)
    for split, file in files.items():
        assert find_files(str(root), split) == find_files(str(file), "") == [file]
    write(root / "x.parquet", columns, NAMES)
    assert "files without a split in their names, 'test'" in refused(capsys, root)
    assert find_files(str(root / "x.parquet"), "") == [root / "x.parquet"]


def test_files_whose_numbers_stand_for_other_classes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, metadata in (
        ("a", NAMES),
        ("b", {b"huggingface": NAMES[b"huggingface"].replace(b"cat", b"ant")}),
    ):
        columns = {"image": images(cell(1)), "label": pa.array([0])}
        write(tmp_path / "data" / folder / "train-00000-of-00001.parquet", columns, metadata)
    error = refused(capsys, tmp_path / "data")
    assert all(name in error for name in ("b/train-00000", "'ant'", "'cat'"))


def test_what_is_no_parquet_file_and_an_output_that_holds_something_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    assert "x.parquet" in refused(capsys, tmp_path / "x.parquet")
    source = write(tmp_path / "good.parquet", {"image": images(cell(1)), "label": [0]}, NAMES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert main([str(source), "--output", str(tmp_path / "out")]) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_training_names_the_command_for_a_parquet_file(tmp_path: Path) -> None:
    source = write(tmp_path / "x.parquet", {"image": images(cell(1), cell(2)), "label": [0, 1]}, NAMES)
    with pytest.raises(UserError) as raised:
        find_labels(source, "auto")
    program, *arguments = str(raised.value).partition("python ")[2].split()
    assert (REPOSITORY / program).samefile(convert_parquet.__file__)
    assert main(arguments) == 0
    assert list(find_labels(tmp_path / "x-shards", "auto").labels.values()) == ["cat", "dog"]

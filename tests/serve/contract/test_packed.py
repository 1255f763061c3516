"""Compressed tar files and archives are called by their kind, and the command makes them readable."""

import gzip
import lzma
import shutil
import subprocess
from bz2 import compress as bzip2
from pathlib import Path

import pytest
from tar_files import make_tar

from serve.contract.errors import UserError
from serve.contract.images import load_image
from serve.contract.packed import PACKED
from serve.inputs.sources import open_source
from serve.outputs.sample import read_sample
from train.data.layouts.registry import find_labels

STREAMS = {".gz": gzip.compress, ".tgz": gzip.compress, ".bz2": bzip2, ".xz": lzma.compress}


def command_of(error: BaseException) -> str:
    return str(error).rpartition("is compressed with ")[2].partition(": ")[2]


@pytest.mark.parametrize("suffix", STREAMS)
@pytest.mark.parametrize("renamed", [False, True])
def test_training_and_scoring_name_the_command_for_a_compressed_tar_file(
    tmp_path: Path, suffix: str, renamed: bool
) -> None:
    plain = make_tar(tmp_path / "set of pets.tar", {"cat.0.jpg": b"1", "dog.0.jpg": b"2"})
    data = STREAMS[suffix](plain.read_bytes())
    plain.unlink()
    packed = plain if renamed else plain.with_suffix(".tgz" if suffix == ".tgz" else f".tar{suffix}")
    packed.write_bytes(data)
    with pytest.raises(UserError) as scoring:
        open_source(str(packed))
    with pytest.raises(UserError) as training:
        find_labels(packed, "auto")
    if shutil.which(command_of(training.value).split()[0]) is None:
        pytest.skip("the program is not installed")
    subprocess.run(command_of(training.value), shell=True, check=True)
    made = packed.with_name("set of pets-plain.tar") if renamed else plain
    assert len(find_labels(made, "auto").labels) == 2
    if not renamed:
        assert command_of(scoring.value) == command_of(training.value)


@pytest.mark.parametrize("packed", PACKED, ids=lambda packed: packed.kind)
def test_every_kind_is_known_by_its_content_and_by_its_name(
    tmp_path: Path, packed: tuple[str, ...]
) -> None:
    kind, beginning, suffixes, _ = packed
    data = beginning + (b"91AY&SY" if kind == "compressed with bzip2" else b"\0" * 20)  # type: ignore[operator]
    file = tmp_path / "renamed.jpg"
    file.write_bytes(data)
    with pytest.raises(UserError, match=kind):
        load_image(data)
    for read in (lambda: open_source(str(file)), lambda: find_labels(file, "auto")):
        with pytest.raises(UserError, match=kind):
            read()
    for suffix in suffixes:
        with pytest.raises(UserError, match=kind):
            open_source(f"s3://bucket/photos{suffix}").inventory  # noqa: B018


def test_compressed_tar_files_beside_plain_ones_are_a_warning_in_training(tmp_path: Path) -> None:
    make_tar(tmp_path / "0.tar", {"cat.0.jpg": b"1", "dog.0.jpg": b"2"})
    (tmp_path / "1.tar.gz").write_bytes(b"")
    (warning,) = find_labels(tmp_path, "auto").warnings
    assert "'1.tar.gz'" in warning


@pytest.mark.parametrize("name", ["photo.jpg", "list.csv", "x-plain.csv"])
def test_what_was_one_file_is_one_again(tmp_path: Path, name: str) -> None:
    packed = tmp_path / ("x.csv" if "plain" in name else f"{name}.gz")
    packed.write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError) as scoring:
        open_source(str(packed))
    subprocess.run(command_of(scoring.value), shell=True, check=True)
    assert (tmp_path / name).read_bytes() == b"x"


@pytest.mark.parametrize("name", ["list.xlsx", "list.XLS", "list.ods"])
def test_a_spreadsheet_is_no_zip_archive(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04" + b"\0" * 20)
    for read in (open_source, read_sample, lambda path: find_labels(Path(path), "auto")):
        with pytest.raises(UserError, match="CSV") as error:
            read(str(tmp_path / name))
        assert "unzip" not in str(error.value)


def test_a_text_that_begins_like_a_magic_number_is_none(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\n")
    (tmp_path / "BZh.txt").write_text("BZhang.jpg\n")
    (tmp_path / "BZhang.jpg").write_bytes(b"")
    assert len(open_source(str(tmp_path / "BZh.txt")).inventory) == 1

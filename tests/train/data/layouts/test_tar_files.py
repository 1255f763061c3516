"""Images in tar files are labelled and trained as the same images in folders are."""

from collections.abc import Mapping
from pathlib import Path

import forked
import pytest
from conftest import SMALL
from forked import train
from tar_files import make_tar
from train_data import flat_set, settings

from serve.contract.errors import UserError
from train.data.index import Data, ImageSet, prepare_data
from train.data.layouts.registry import find_labels


def labels(source: Path) -> dict[str, str]:
    found = find_labels(source, "auto")
    assert found.root == (source.parent if source.is_file() else source)
    assert not found.warnings
    return found.labels


def test_an_image_beside_the_photograph_of_its_key_is_left_out_in_every_shard(tmp_path: Path) -> None:
    make_tar(
        tmp_path / "0.tar", {"a.jpg": b"", "a.seg.png": b"", "a.cls": b"1", "b.JPG": b"", "b.cls": b"2"}
    )
    make_tar(tmp_path / "1.tar", {"d.seg.png": b"", "d.cls": b"1", "c.big.png": b"", "c.cls": b"2"})
    found = find_labels(tmp_path, "auto")
    assert found.labels == {"0.tar/a.jpg": "1", "0.tar/b.JPG": "2", "1.tar/c.big.png": "2"}
    (warning,) = found.warnings
    assert warning.startswith("2 ")
    assert "KEY.seg.png" in warning


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"000.jpg": "", "000.cls": "7\n", "a/b.big.png": "", "a/b.cls": "red fox"}, ["7", "red fox"]),
        ({"cat/1.jpg": "", "./dog/deep/1.jpg": "", "README": ""}, ["cat", "dog"]),
        ({"cat.0.jpg": "", "big_dog_12.png": "", "._cat.0.jpg": "litter"}, ["cat", "big_dog"]),
    ],
    ids=["WebDataset", "folders", "names"],
)
def test_labels_are_members_or_folders_or_names(
    tmp_path: Path, members: Mapping[str, str], expected: list[str]
) -> None:
    tar = make_tar(tmp_path / "shard-0.tar", {name: text.encode() for name, text in members.items()})
    assert list(labels(tar).values()) == expected
    assert list(labels(tmp_path).values()) == expected
    assert all(path.startswith("shard-0.tar/") for path in labels(tmp_path))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (
            {"0.jpg": b"", "1.jpg": b"", "0.cls": b"cat"},
            r"x\.tar: '1\.jpg' .*\b1\.cls",
        ),
        ({"0.jpg": b"", "0.cls": b" \n"}, r"x\.tar: '0\.cls' .*empty"),
        ({"0.jpg": b"", "0.cls": b"c" * 2000}, r"x\.tar: '0\.cls' .*1000 bytes"),
        (
            {"0.jpg": b"", "0.png": b"", "0.cls": b"cat"},
            r"x\.tar: '0\.jpg', '0\.png' .*key.* 0\.jpg and",
        ),
        (
            {"0.left.jpg": b"", "0.right.jpg": b"", "0.cls": b"cat"},
            r"'0\.left\.jpg', '0\.right\.jpg' .*key",
        ),
        (
            {"img.0.jpg": b"", "img.0.cls": b"cat", "img.1.jpg": b"", "img.1.cls": b"dog"},
            r"'img\.0\.cls', 'img\.1\.cls' .*key",
        ),
        (
            {"0.jpg": b"", "0.cls": b"nan", "1.jpg": b"", "1.cls": b"cat"},
            r"'nan' .*\(1 of 2 images\)",
        ),
        (
            {"0.jpg": b"", "0.cls": "\uace0\uc591\uc774".encode("cp949")},
            r"'0\.cls' is not UTF-8: .* cp949",
        ),
        ({"photo.jpg": b""}, r"x\.tar: .*'photo\.jpg': .*\.cls"),
        ({"README": b""}, "no images in .*tar files"),
    ],
)
def test_an_image_without_a_label_is_an_error(
    tmp_path: Path, members: Mapping[str, bytes], reason: str
) -> None:
    make_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=reason):
        find_labels(tmp_path, "auto")


def test_system_folders_of_a_tar_file_hold_no_images(tmp_path: Path) -> None:
    litter = {"__MACOSX/cat/1.jpg": b"", "cat/@eaDir/0.jpg/t.jpg": b"", "cat/._0.jpg": b""}
    make_tar(tmp_path / "x.tar", {"cat/0.jpg": b"", "dog/0.jpg": b""} | litter)
    assert labels(tmp_path) == {"x.tar/cat/0.jpg": "cat", "x.tar/dog/0.jpg": "dog"}


def test_parts_of_a_data_set_in_a_tar_file_are_refused(tmp_path: Path) -> None:
    parts = {f"seg_{p}/{name}/0.jpg": b"" for p in ("train", "test") for name in ("sea", "forest")}
    make_tar(tmp_path / "x.tar", parts)
    with pytest.raises(UserError, match=r"'seg_test', 'seg_train'.*--data, in tar files"):
        find_labels(tmp_path, "auto")
    labelled = {"train/0.jpg": b"", "train/0.cls": b"cat", "test/1.jpg": b"", "test/1.cls": b"dog"}
    make_tar(tmp_path / "x.tar", labelled)
    assert set(labels(tmp_path).values()) == {"cat", "dog"}


def test_a_damaged_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", {"cat.0.jpg": b"x" * 999})
    whole = make_tar(tmp_path / "b.tar", {"cat.1.jpg": b"x" * 999})
    whole.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"b\.tar"):
        find_labels(tmp_path, "auto")


def shards_of(folder: Path, into: Path, count: int) -> Path:
    files = sorted(folder.iterdir())
    for shard in range(count):
        part = {path.name: path.read_bytes() for path in files[shard::count]}
        make_tar(into / f"shard-{shard}.tar", part)
    return into


def contents(images: ImageSet) -> dict[str, tuple[str, str]]:
    """Name -> class, hash"""
    names = [Path(path).name for path in images.paths]
    classes = [images.class_names[label] for label in images.labels]
    return dict(zip(names, zip(classes, images.sha256, strict=True), strict=True))


def test_the_split_is_that_of_the_same_images_in_a_folder(tmp_path: Path) -> None:
    folder = flat_set(tmp_path / "images", per_class=10)
    shards = shards_of(folder, tmp_path / "shards", 3)

    def prepared(data: Path) -> Data:
        return prepare_data(settings(tmp_path, data=str(data)))

    flat, packed = prepared(folder), prepared(shards)
    assert contents(flat.train) == contents(packed.train)
    assert contents(flat.val) == contents(packed.val)


def test_an_unreadable_member_is_listed_and_left_out(tmp_path: Path) -> None:
    folder = flat_set(tmp_path / "images", per_class=8)
    (folder / "cat.99.jpg").write_bytes(b"no image")
    shards = shards_of(folder, tmp_path / "shards", 1)
    data = prepare_data(settings(tmp_path, data=str(shards), max_bad=0.2))
    assert list(data.bad) == [str(shards / "shard-0.tar" / "cat.99.jpg")]


def test_shards_are_trained_and_exported_from(sample: Path, tmp_path: Path) -> None:
    shards = shards_of(sample / "train", tmp_path / "shards", 3)
    settings = ["--data", shards, *SMALL, "--epochs", 1, "--name", "tar", "--track", "false"]
    assert "160 images" in train(2, *settings, cwd=tmp_path)
    run = tmp_path / "runs" / "tar"
    assert "same class          100.00%" in forked.run("export/main.py", "--run", run, cwd=tmp_path)


def test_shards_of_training_and_of_validation_in_one_folder_are_refused(tmp_path: Path) -> None:
    for name in ("pets-train-0.tar", "pets-train-1.tar", "pets-validation-0.tar"):
        make_tar(tmp_path / name, {"cat/1.jpg": b"", "dog/1.jpg": b""})
    with pytest.raises(UserError, match=r"pets-train-0\.tar .*pets-validation-0\.tar"):
        find_labels(tmp_path, "auto")
    (tmp_path / "pets-validation-0.tar").rename(tmp_path / "pets-train-2.tar")
    assert len(labels(tmp_path)) == 6

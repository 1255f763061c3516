"""Images in tar files are labelled and trained as the same images in folders are."""

from collections.abc import Mapping
from pathlib import Path

import forked
import pytest
from conftest import SMALL
from forked import train
from tar_files import make_tar
from train_data import flat_set, settings

from train.data.index import Data, ImageSet, find_labels, prepare_data


def labels(source: Path) -> dict[str, str]:
    _, found, layout, problems = find_labels(source, "auto")
    assert layout == "images in tar files"
    assert not problems
    return found


def test_an_image_beside_the_photograph_of_its_key_is_left_out_in_every_shard(tmp_path: Path) -> None:
    make_tar(
        tmp_path / "0.tar", {"a.jpg": b"", "a.seg.png": b"", "a.cls": b"1", "b.JPG": b"", "b.cls": b"2"}
    )
    make_tar(tmp_path / "1.tar", {"d.seg.png": b"", "d.cls": b"1", "c.big.png": b"", "c.cls": b"2"})
    _, found, _, problems = find_labels(tmp_path, "auto")
    assert found == {"0.tar/a.jpg": "1", "0.tar/b.JPG": "2", "1.tar/c.big.png": "2"}
    assert [problem.partition(" are")[0] for problem in problems] == ["2 images KEY.seg.png"]


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
            r"x\.tar: '1\.jpg' has no label: .* no 1\.cls",
        ),
        ({"0.jpg": b"", "0.cls": b" \n"}, r"x\.tar: '0\.cls' is no label: it is empty"),
        ({"0.jpg": b"", "0.cls": b"c" * 2000}, r"x\.tar: '0\.cls' is no label: .* above 1000 bytes"),
        (
            {"0.jpg": b"", "0.png": b"", "0.cls": b"cat"},
            r"x\.tar: '0\.jpg', '0\.png' have one key, .* call one of them 0\.jpg",
        ),
        ({"0.left.jpg": b"", "0.right.jpg": b"", "0.cls": b"cat"}, r"'0\.left\.jpg', '0\.right\.jpg' have"),
        (
            {"img.0.jpg": b"", "img.0.cls": b"cat", "img.1.jpg": b"", "img.1.cls": b"dog"},
            r"'img\.0\.cls', 'img\.1\.cls' have one key, which ends at the first dot",
        ),
        (
            {"0.jpg": b"", "0.cls": b"nan", "1.jpg": b"", "1.cls": b"cat"},
            "'nan' stands for no label",
        ),
        (
            {"0.jpg": b"", "0.cls": "\uace0\uc591\uc774".encode("cp949")},
            "'0.cls' is not UTF-8: .* in cp949",
        ),
        ({"photo.jpg": b""}, r"x\.tar: no label for 'photo\.jpg': give it a member .*\.cls, a folder"),
        ({"README": b""}, "the tar files of .* hold no images"),
    ],
)
def test_an_image_without_a_label_is_an_error(
    tmp_path: Path, members: Mapping[str, bytes], reason: str
) -> None:
    make_tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=reason):
        find_labels(tmp_path, "auto")


def test_system_folders_of_a_tar_file_hold_no_images(tmp_path: Path) -> None:
    litter = {"__MACOSX/cat/1.jpg": b"", "cat/@eaDir/0.jpg/t.jpg": b"", "cat/._0.jpg": b""}
    make_tar(tmp_path / "x.tar", {"cat/0.jpg": b"", "dog/0.jpg": b""} | litter)
    assert find_labels(tmp_path, "auto")[1] == {"x.tar/cat/0.jpg": "cat", "x.tar/dog/0.jpg": "dog"}


def test_parts_of_a_data_set_in_a_tar_file_are_refused(tmp_path: Path) -> None:
    parts = {f"seg_{p}/{name}/0.jpg": b"" for p in ("train", "test") for name in ("sea", "forest")}
    make_tar(tmp_path / "x.tar", parts)
    with pytest.raises(ValueError, match=r"looks like parts of a data set: .* in tar files of its own"):
        find_labels(tmp_path, "auto")
    labelled = {"train/0.jpg": b"", "train/0.cls": b"cat", "test/1.jpg": b"", "test/1.cls": b"dog"}
    make_tar(tmp_path / "x.tar", labelled)
    assert set(find_labels(tmp_path, "auto")[1].values()) == {"cat", "dog"}


def test_a_damaged_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", {"cat.0.jpg": b"x" * 999})
    whole = make_tar(tmp_path / "b.tar", {"cat.1.jpg": b"x" * 999})
    whole.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"b\.tar cannot be read as a tar file"):
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
    assert data.bad == {str(shards / "shard-0.tar" / "cat.99.jpg"): "not an image file of a known format"}


def test_shards_are_trained_and_exported_from(sample: Path, tmp_path: Path) -> None:
    shards = shards_of(sample / "train", tmp_path / "shards", 3)
    settings = ["--data", shards, *SMALL, "--epochs", 1, "--name", "tar", "--track", "false"]
    assert "160 images, images in tar files" in train(2, *settings, cwd=tmp_path)
    run = tmp_path / "runs" / "tar"
    assert "argmax agreement 100.00%" in forked.run("export/main.py", "--run", run, cwd=tmp_path)

"""Images in tar files are labelled and trained as the same images in folders are."""

import tarfile
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


@pytest.mark.parametrize(
    "names",
    [
        ("pets-0.tar", "pets-val-0.tar"),
        ("pets-0.tar", "val-0.tar"),
        ("0.tar", "test.tar"),
        ("a-0.tar", "b-test-0.tar"),
        ("test-0.tar", "val-0.tar"),
        ("pets-train-0.tar", "val-0.tar"),
    ],
)
def test_shards_of_a_part_beside_others_of_its_classes_are_refused(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    for name in names:
        make_tar(tmp_path / name, {"cat/1.jpg": b"", "dog/1.jpg": b""})
    with pytest.raises(UserError, match=r"folder of its own") as raised:
        find_labels(tmp_path, "auto")
    assert all(name in str(raised.value) for name in names)


@pytest.mark.parametrize(
    "names", [("control-0", "test-0"), ("crash-0", "crash-test-0"), ("val-0", "val-1")]
)
def test_shards_that_are_called_as_parts_and_are_none_are_read(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    same = names[0] == "val-0"
    for i, name in enumerate(names):
        make_tar(tmp_path / f"{name}.tar", {f"{'owl' if same else i}/1.jpg": b"", f"cat{i}/1.jpg": b""})
    assert len(labels(tmp_path)) == 4


# labels that are not read

UNREAD = [("json", b'{"label": 3}'), ("txt", b"a photo of a fox"), ("CLS", b"fox"), ("cls.txt", b"fox")]
UNREAD += [("label", b"3"), ("JSON", b'{"label": "fox", "key": "a_1"}')]


@pytest.mark.parametrize(("suffix", "text"), UNREAD)
@pytest.mark.parametrize("stem", ["{}_{}", "0000{}{}", "a.{}.{}"])
def test_labels_in_members_that_are_not_read_are_no_reason_to_invent_some(
    tmp_path: Path, suffix: str, text: bytes, stem: str
) -> None:
    members = {}
    for i in range(6):
        name = stem.format(i % 2, i)
        members |= {f"{name}.jpg": b"", f"{name}.{suffix}": text}
    make_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=rf"x\.tar: '{stem.format(0, 0)}\.{suffix}' .*KEY\.cls.*label file"):
        find_labels(tmp_path, "auto")


def test_members_beside_images_in_class_folders_are_warned_of_or_surely_labels(tmp_path: Path) -> None:
    images = {f"{name}/{i}.jpg": b"" for name in ("cat", "dog") for i in range(2)}
    make_tar(tmp_path / "x.tar", images | {"dog/0.json": b'{"width": 640}', "README.txt": b"x"})
    found = find_labels(tmp_path, "auto")
    assert set(found.labels.values()) == {"cat", "dog"}
    (warning,) = found.warnings
    assert "'dog/0.json'" in warning
    make_tar(tmp_path / "x.tar", images | {"dog/0.CLS": b"wolf"})
    with pytest.raises(UserError, match=r"'dog/0\.CLS'"):
        find_labels(tmp_path, "auto")
    make_tar(tmp_path / "x.tar", {"images/0.jpg": b"", "images/0.json": b'{"label": "cat"}'})
    with pytest.raises(UserError, match=r"'images/0\.json'"):
        find_labels(tmp_path, "auto")


def test_a_shard_without_label_files_beside_others_is_named(tmp_path: Path) -> None:
    make_tar(tmp_path / "0.tar", {"a.jpg": b"", "a.cls": b"1"})
    make_tar(tmp_path / "1.tar", {"c.1.jpg": b"", "c.2.jpg": b""})
    make_tar(tmp_path / "2.tar", {"README": b""})
    with pytest.raises(UserError, match=r"/1\.tar: .*\.cls"):
        find_labels(tmp_path, "auto")


# what is left out of class folders, and around them


def test_an_image_beside_the_photograph_of_its_key_is_left_out_of_class_folders(tmp_path: Path) -> None:
    images = {f"{name}/{i}.jpg": b"" for name in ("cat", "dog") for i in range(3)}
    masks = {image.replace(".jpg", ".seg.png"): b"" for image in images}
    make_tar(tmp_path / "x.tar", images | masks)
    found = find_labels(tmp_path, "auto")
    assert set(found.labels) == {f"x.tar/{image}" for image in images}
    (warning,) = found.warnings
    assert warning.startswith("6 ")
    assert "KEY.seg.png" in warning
    names = {"cat/img.jpg": b"", "cat/img.1.jpg": b"", "dog/a.big.jpg": b"", "dog/b.big.jpg": b""}
    make_tar(tmp_path / "x.tar", names | {"dog/c.big.jpg": b"", "dog/c.jpg": b""})
    assert len(labels(tmp_path)) == 6


@pytest.mark.parametrize("flag", ["--data", "--val-data"])
@pytest.mark.parametrize("around", ["pets", "./data/pets"])
def test_a_folder_around_the_class_folders_is_no_class(tmp_path: Path, around: str, flag: str) -> None:
    for shard in range(2):
        images = {f"{around}/{name}/{shard}.jpg": b"" for name in ("cat", "dog")}
        make_tar(tmp_path / f"{shard}.tar", images)
    found = find_labels(tmp_path, "auto", flag)
    assert sorted(found.labels.values()) == ["cat", "cat", "dog", "dog"]
    assert "pets'" in found.layout


def test_a_folder_around_named_images_is_refused_with_the_command(tmp_path: Path) -> None:
    make_tar(tmp_path / "x.tar", {f"my pets/{name}.{i}.jpg": b"" for name in ("a", "b") for i in range(2)})
    with pytest.raises(UserError, match=r"tar -C 'my pets' -cf 'my pets\.tar' \."):
        find_labels(tmp_path, "auto")


def test_hidden_class_folders_are_named(tmp_path: Path) -> None:
    litter = {".git/1.jpg": b"", "9mm/._0.jpg": b""}
    make_tar(tmp_path / "x.tar", {".50 BMG/0.jpg": b"", "9mm/0.jpg": b"", "45/0.jpg": b""} | litter)
    found = find_labels(tmp_path, "auto")
    assert set(found.labels.values()) == {"9mm", "45"}
    assert "('.50 BMG')" in found.layout


def test_links_are_counted(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar", {"cat/0.jpg": b"", "dog/0.jpg": b""})
    links = [("cat/1.jpg", tarfile.LNKTYPE), ("owl", tarfile.SYMTYPE), ("a.txt", tarfile.SYMTYPE)]
    with tarfile.open(tar, "a") as file:
        for name, kind in links:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "cat/0.jpg"
            file.addfile(link)
    found = find_labels(tmp_path, "auto")
    assert len(found.labels) == 2
    (warning,) = found.warnings
    assert warning.startswith("2 ")
    assert "x.tar/cat/1.jpg" in warning
    assert "x.tar/owl" in warning

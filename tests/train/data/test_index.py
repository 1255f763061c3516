"""Indexing and splitting a data set: its layouts, errors with the way out, a split without leaks."""

import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from tar_files import make_tar
from train_data import draw, flat_set, image_set, settings

from serve.contract.doubts import NARROW
from serve.contract.errors import UserError
from train.config import TrainConfig
from train.data.index import (
    Data,
    ImageSet,
    class_weights,
    natural_key,
    prepare_data,
    split,
)
from train.data.layouts.registry import find_labels
from train.data.sample import draw_face


def prepare(tmp_path: Path, data: Path | None = None, **changes: object) -> Data:
    return prepare_data(settings(tmp_path, data=str(data or tmp_path / "images"), **changes))


def folder_set(root: Path, names: tuple[str, ...] = ("cat", "dog"), per_class: int = 4) -> Path:
    for label, name in enumerate(names):
        for i in range(per_class):
            draw(root / name / f"{i}.png", label, i)
    return root


def label_file(root: Path, rows: list[str], header: str = "path,label") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "labels.csv").write_text("\n".join([header, *rows]), encoding="utf-8")
    return root / "labels.csv"


def labels_of(images: ImageSet) -> dict[str, str]:
    names = [images.class_names[label] for label in images.labels]
    return dict(zip(images.paths, names, strict=True))


def both(data: Data) -> dict[str, str]:
    return labels_of(data.train) | labels_of(data.val)


# layouts


def test_labels_in_file_names_are_recognised(tmp_path: Path) -> None:
    flat_set(tmp_path / "images")
    data = prepare(tmp_path)
    assert data.train.class_names == ("cat", "dog")
    assert len(both(data)) == 12
    assert all(path.startswith(label) for path, label in both(data).items())
    assert "12 images" in data.notes[0]
    assert "label.number.suffix" in data.notes[0]


def test_a_folder_per_class_is_recognised_with_folders_below_it(tmp_path: Path) -> None:
    folder_set(tmp_path / "images")
    draw(tmp_path / "images" / "cat" / "kittens" / "deep" / "1.png", 0, 77)
    data = prepare(tmp_path)
    assert both(data)["cat/kittens/deep/1.png"] == "cat"
    assert len(both(data)) == 9


def test_a_label_file_is_recognised_with_relative_and_absolute_paths(tmp_path: Path) -> None:
    far = draw(tmp_path / "elsewhere" / "x.png", 1, 50)
    for i in range(3):
        draw(tmp_path / "m" / "pics" / f"{i}.png", 0, i)
    file = label_file(
        tmp_path / "m", ['pics/0.png,"a, b"', 'pics/1.png,"a, b"', "pics/2.png,고양이", f"{far},고양이"]
    )
    data = prepare(tmp_path, file)
    assert both(data) == {
        "pics/0.png": "a, b",
        "pics/1.png": "a, b",
        "pics/2.png": "고양이",
        str(far): "고양이",
    }


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("cat.0.jpg", "cat"),
        ("american_bulldog_12.jpg", "american_bulldog"),
        ("shiba inu (3).jpg", "shiba inu"),
        ("v1.5-turbo.7.jpg", "v1.5-turbo"),
        ("고양이-004.JPEG", "고양이"),
        ("Egyptian_Mau_1.png", "Egyptian_Mau"),
        ("2cv.3.webp", "2cv"),
        ("a\nb.1.png", "a\nb"),
    ],
)
def test_the_label_is_what_stands_before_the_running_number(tmp_path: Path, name: str, label: str) -> None:
    (tmp_path / name).touch()
    assert find_labels(tmp_path, "auto").labels == {name: label}


@pytest.mark.parametrize("name", ["1.jpg", "cat.jpg", "cat0.jpg", "_1.jpg", "(3).jpg"])
def test_a_file_name_without_a_label_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    (tmp_path / "cat.0.jpg").touch()
    with pytest.raises(UserError, match=re.escape(repr(name))):
        find_labels(tmp_path, "auto")


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "test_1", "validation"), ("train",)])
def test_parts_of_a_data_set_are_not_taken_for_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        folder_set(tmp_path / "images" / name)
    tar = shutil.make_archive(str(tmp_path / "set"), "tar", tmp_path / "images")
    for source in (tmp_path / "images", Path(tar)):
        if names == ("train",) and source.is_file():  # the folder is around the classes of the tar file
            assert set(find_labels(source, "auto").labels.values()) == {"cat", "dog"}
            continue
        with pytest.raises(UserError, match=f"{names[0]!r}.* --data"):
            find_labels(source, "auto")
    for classes in (("train", "plane"), ("test1", "test2")):
        root = folder_set(tmp_path / classes[1], classes)
        assert set(find_labels(root, "auto").labels.values()) == set(classes)


@pytest.mark.parametrize("make", [flat_set, folder_set])
def test_files_that_are_no_images_by_their_suffix_are_counted(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    root = make(tmp_path / "images")
    where = root / "cat" if (root / "cat").is_dir() else root
    draw(where / "cat.9.jpg").rename(where / "cat.9.jfif")
    for name in ("cat.7.jxl", "cat.8.JXL", "notes.txt", ".DS_Store", "README"):
        (where / name).touch()
    found = find_labels(root, "auto")
    assert any(name.endswith("cat.9.jfif") for name in found.labels)
    (warning,) = found.warnings
    assert warning.startswith("4 files")
    assert "(.jxl 2, without a suffix 1, .txt 1); convert .jxl" in warning


def test_images_beside_folders_are_ambiguous_until_the_format_is_given(tmp_path: Path) -> None:
    root = folder_set(tmp_path / "images")
    flat_set(root)
    with pytest.raises(ValueError, match="--data-format flat or --data-format folders"):
        prepare(tmp_path)
    assert len(both(prepare(tmp_path, data_format="flat"))) == 12
    assert len(both(prepare(tmp_path, data_format="folders"))) == 8


def test_litter_is_no_image(tmp_path: Path) -> None:
    root = folder_set(tmp_path / "images")
    before = both(prepare(tmp_path))
    for seed, litter in enumerate(
        (
            "cat/._0.png",
            ".hidden/1.png",
            "cat/.ipynb_checkpoints/0-checkpoint.png",
            "._x.jpg",
            "cat/day1/.thumbnails/x.jpg",
            "cat/day1/._x.jpg",
        )
    ):
        draw(root / litter, seed=100 + seed)
    (root / "dog" / "Thumbs.db").write_bytes(b"x")
    assert both(prepare(tmp_path)) == before


def test_litter_is_no_image_in_a_flat_folder(tmp_path: Path) -> None:
    root = flat_set(tmp_path / "images")
    (root / "._cat.0.png").write_bytes(b"\0\5\x16\7")
    (root / "notes.txt").write_text("x")
    assert len(both(prepare(tmp_path))) == 12


def test_a_linked_folder_inside_a_class_is_reported_and_not_followed(tmp_path: Path) -> None:
    root = folder_set(tmp_path / "images")
    (root / "cat" / "loop").symlink_to(root)
    data = prepare(tmp_path)
    assert len(both(data)) == 8
    assert any("'cat/loop': linked folder" in note for note in data.notes)


# errors


def one_class(root: Path) -> Path:
    return flat_set(root, names=("cat",))


def empty_class(root: Path) -> Path:
    (folder_set(root) / "bird").mkdir()
    return root


def empty(root: Path) -> Path:
    root.mkdir()
    return root


def missing(root: Path) -> Path:
    return root


def broken(root: Path) -> Path:
    flat_set(root)
    (root / "cat.99.png").write_bytes(b"not a picture")
    return root


def broken_class(root: Path) -> Path:
    folder_set(root, per_class=300)
    (root / "bird").mkdir()
    (root / "bird" / "0.png").write_bytes(b"not a picture")
    return root


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (one_class, "images has one class, 'cat'"),
        (empty_class, "class folder '.*bird' .*move it"),
        (empty, "images holds no images"),
        (missing, "--data '.*images' does not exist"),
        (
            broken,
            r"1 of 13 images .*--max-bad 0\.01 .*'cat\.99\.png': .*--exclude",
        ),
        (broken_class, r"class 'bird' in .*images .*'bird/0\.png'"),
    ],
)
def test_unusable_data_is_an_error_that_names_it_and_the_way_out(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    make(tmp_path / "images")
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path)


def test_validation_data_that_are_missing_are_called_by_their_flag(tmp_path: Path) -> None:
    flat_set(tmp_path / "images")
    with pytest.raises(ValueError, match=r"^--val-data 'nowhere' does not exist"):
        prepare(tmp_path, val_data="nowhere")


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["a.png,cat"], "file,class", "path,label.*'file' 'a.png', 'class' 'cat'"),
        (["a.png,cat", "b.png"], "path,label", "line 3: .*empty"),
        ([",cat"], "path,label", "line 2: .*empty"),
        (["a.png,cat", "a.png,dog"], "path,label", "line 3: 'a.png' .*twice"),
        ([], "path,label", "no images"),
        ([], "", "path,label.*empty"),
    ],
)
def test_a_faulty_label_file_is_an_error_that_names_the_line(
    tmp_path: Path, rows: list[str], header: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_labels(label_file(tmp_path, rows, header), "auto")


def test_a_label_file_from_excel_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "labels.csv").write_bytes("path,label\r\na.png,cat\r\n".encode("utf-8-sig"))
    assert find_labels(tmp_path / "labels.csv", "auto").labels == {"a.png": "cat"}


@pytest.mark.parametrize("data_format", ["csv", "flat", "folders"])
def test_the_wrong_format_is_an_error_that_names_it(tmp_path: Path, data_format: str) -> None:
    source = tmp_path if data_format == "csv" else label_file(tmp_path, ["a.png,cat"])
    with pytest.raises(ValueError, match=f"{source.name}.*--data-format {data_format}"):
        find_labels(source, data_format)


def test_a_file_that_is_no_label_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b'path,label\n"' + b"x" * 200_000)  # a quote that stays open
    with pytest.raises(ValueError, match=r"x\.bin.*--data-format"):
        find_labels(tmp_path / "x.bin", "auto")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    root = folder_set(tmp_path / "images")
    (root / "cat").chmod(0)
    with pytest.raises(ValueError, match=r"cat.*Permission denied"):
        prepare(tmp_path)


def test_pictures_that_look_wrong_are_trained_on_and_named(tmp_path: Path) -> None:
    root = folder_set(tmp_path / "images")
    for i in range(5):
        narrow = np.arange(i, i + 48 * 40, dtype=np.uint16).reshape(40, 48)
        Image.fromarray(narrow).save(root / "dog" / f"x{i}.png")
    data = prepare(tmp_path)
    assert len(both(data)) == 13
    (note,) = [note for note in data.notes if NARROW in note]
    assert note.startswith("warning: ")
    assert "5 pictures" in note
    assert "'dog/x0.png'" in note


def test_a_few_unreadable_files_are_left_out_and_named(tmp_path: Path) -> None:
    broken(tmp_path / "images")
    data = prepare(tmp_path, max_bad=0.1)
    (path,) = data.bad
    assert path == str(tmp_path / "images" / "cat.99.png")
    assert len(both(data)) == 12


def test_as_many_unreadable_files_as_max_bad_says_are_allowed(tmp_path: Path) -> None:
    root = flat_set(tmp_path / "images", per_class=5)
    assert prepare(tmp_path, max_bad=0).bad == {}
    (root / "cat.0.png").write_bytes(b"not a picture")
    assert list(prepare(tmp_path, max_bad=0.1).bad) == [str(root / "cat.0.png")]
    with pytest.raises(ValueError, match=r"1 of 10 images .*--max-bad 0\.09 "):
        prepare(tmp_path, max_bad=0.09)


# class order


def test_classes_are_sorted_naturally(tmp_path: Path) -> None:
    flat_set(tmp_path / "images", names=("c10", "c2", "b", "c1"))
    assert prepare(tmp_path).train.class_names == ("b", "c1", "c2", "c10")


@given(st.text(max_size=8), st.text(max_size=8))
def test_different_classes_have_one_order(a: str, b: str) -> None:
    """Otherwise the order of "1" and "01" would be that of a set of strings, new in each process."""
    assert (natural_key(a) == natural_key(b)) == (a == b)
    assert sorted([a, b], key=natural_key) == sorted([b, a], key=natural_key)


@pytest.mark.parametrize("make", [flat_set, folder_set])
def test_the_order_of_the_listing_cannot_change_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path]
) -> None:
    make(tmp_path / "images")
    before = prepare(tmp_path)
    scandir, listdir, rng = os.scandir, os.listdir, random.Random(0)

    class Shuffled:
        def __init__(self, *args: object):
            with scandir(*args) as entries:  # type: ignore[call-overload]
                self.entries = list(entries)
            rng.shuffle(self.entries)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *args: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Shuffled)
    monkeypatch.setattr(os, "listdir", lambda *args: rng.sample(listdir(*args), len(listdir(*args))))
    for _ in range(3):
        after = prepare(tmp_path)
        assert after.digest == before.digest
        assert after.train.paths == before.train.paths
        assert after.train.labels.tolist() == before.train.labels.tolist()


# val_data


def test_val_data_is_mapped_by_class_name(tmp_path: Path) -> None:
    flat_set(tmp_path / "images", names=("ant", "bee", "cat"))
    for i in range(2):
        draw(tmp_path / "val" / f"bee.{i}.png", 1, 100 + i)
        draw(tmp_path / "val" / f"cat.{i}.png", 2, 100 + i)
    data = prepare(tmp_path, val_data=str(tmp_path / "val"))
    assert data.val.class_names == data.train.class_names == ("ant", "bee", "cat")
    assert data.val.counts() == {"ant": 0, "bee": 2, "cat": 2}
    (warning,) = [note for note in data.notes if note.startswith("warning: ")]
    assert "'ant'" in warning
    assert str(tmp_path / "val") in warning
    assert all(path.startswith(label) for path, label in labels_of(data.val).items())
    assert len(data.train) == 18


def test_unreadable_files_of_both_sets_are_named(tmp_path: Path) -> None:
    broken(tmp_path / "images")
    broken(tmp_path / "val")
    bad = prepare(tmp_path, val_data=str(tmp_path / "val"), max_bad=0.1).bad
    assert set(bad) == {str(tmp_path / name / "cat.99.png") for name in ("images", "val")}


def test_an_unknown_class_in_val_data_is_an_error_that_names_it(tmp_path: Path) -> None:
    flat_set(tmp_path / "images")
    flat_set(tmp_path / "val", names=("cat", "wolf"))
    with pytest.raises(UserError, match=r"--val-data .*'wolf'.*'cat', 'dog'$"):
        prepare(tmp_path, val_data=str(tmp_path / "val"))


def test_unknown_classes_in_val_data_name_the_likely_spelling_or_folder(tmp_path: Path) -> None:
    folder_set(tmp_path / "images")
    folder_set(tmp_path / "val" / "val")
    with pytest.raises(UserError, match=rf"'val'.* --val-data {tmp_path}/val/val$"):
        prepare(tmp_path, val_data=str(tmp_path / "val"))
    folder_set(tmp_path / "other", names=("Cat", "dog"))
    with pytest.raises(UserError, match=r"'Cat'.* 'Cat' .* 'cat':"):
        prepare(tmp_path, val_data=str(tmp_path / "other"))


def test_names_of_numbered_classes_that_fit_the_validation_data_alone_are_named(tmp_path: Path) -> None:
    root = flat_set(tmp_path / "images", names=("0", "1", "2"))
    (root / "names.json").write_text('{"0": "ant", "1": "bee", "2": "cat", "3": "dog"}')
    rows = [f"{number}.{i}.png,{number}" for i in range(6) for number in range(3)]
    (root / "val.csv").write_text("\n".join(["path,label", *rows[:3]]))
    with pytest.raises(UserError, match=r"'ant'.* only '0', '1', '2'; .*JSON.*move it away$"):
        prepare(tmp_path, label_file(root, rows[3:]), val_data=str(root / "val.csv"))


def test_images_in_both_sets_are_warned_of(tmp_path: Path) -> None:
    flat_set(tmp_path / "images")
    shutil.copytree(tmp_path / "images", tmp_path / "val")
    data = prepare(tmp_path, val_data=str(tmp_path / "val"))
    assert any(note.startswith("warning: 12 images") for note in data.notes)


def test_near_duplicates_in_both_sets_are_warned_of(tmp_path: Path) -> None:
    root = faces(tmp_path / "images")
    faces(tmp_path / "val", first=50)
    for i in range(3):
        re_encode(root / f"cat.{i}.jpg", tmp_path / "val" / f"cat.{i}.jpg")
    notes = prepare(tmp_path, val_data=str(tmp_path / "val")).notes
    (warning,) = [note for note in notes if note.startswith("warning: ")]
    assert "3 images" in warning
    assert "re-encoded" in warning
    notes = prepare(tmp_path, val_data=str(tmp_path / "val"), near_duplicates=False).notes
    assert not any(note.startswith("warning: ") for note in notes)


def test_a_copy_in_both_sets_is_not_warned_of_twice_though_it_has_near_duplicates(tmp_path: Path) -> None:
    root = faces(tmp_path / "images", per_class=2)
    re_encode(root / "cat.0.jpg", root / "cat.100.jpg")
    val = faces(tmp_path / "val", per_class=1, first=50)
    shutil.copy(root / "cat.0.jpg", val)
    data = prepare(tmp_path, val_data=str(val))
    assert len(data.near) == 2
    (warning,) = [note for note in data.notes if note.startswith("warning: 1 images")]
    assert "re-encoded" not in warning


# near duplicates, folds, exclude


def faces(root: Path, per_class: int = 10, first: int = 0) -> Path:
    root.mkdir(parents=True)
    for label in ("cat", "dog"):
        for i in range(first, first + per_class):
            image = draw_face(label, np.random.default_rng([i, label == "dog"]))
            image.save(root / f"{label}.{i}.jpg", quality=95)
    return root


def re_encode(file: Path, copy: Path) -> None:
    with Image.open(file) as image:
        image.resize((image.width - 20, image.height - 10)).save(copy, quality=60)


def test_near_duplicates_stay_on_one_side_unless_that_is_turned_off(tmp_path: Path) -> None:
    root = faces(tmp_path / "images")
    for i in range(10):
        for label in ("cat", "dog"):
            re_encode(root / f"{label}.{i}.jpg", root / f"{label}.{i + 100}.jpg")

    def divided(near_duplicates: bool) -> int:
        data = prepare(tmp_path, near_duplicates=near_duplicates, val_fraction=0.5)
        number = {path: int(path.split(".")[1]) % 100 for path in [*data.train.paths, *data.val.paths]}
        sides = [{(path[:3], number[path]) for path in images.paths} for images in (data.train, data.val)]
        assert any("near duplicates" in note and " 20;" in note for note in data.notes) == near_duplicates
        assert len(data.val) == 20
        return len(sides[0] & sides[1])

    assert divided(True) == 0
    assert divided(False) > 0


def test_where_labels_differ_within_pictures_that_look_the_same_only_copies_are_grouped(
    tmp_path: Path,
) -> None:
    root = faces(tmp_path / "images", per_class=6)
    for i in range(6):
        re_encode(root / f"cat.{i}.jpg", root / f"dog.{i + 100}.jpg")
    data = prepare(tmp_path, val_fraction=0.5)
    assert any(note.startswith("warning: ") for note in data.notes)
    assert data.val.counts() == {"cat": 3, "dog": 6}
    assert len(data.near) == 12


def test_folds_cover_the_data_once_and_share_one_content_digest(tmp_path: Path) -> None:
    root = faces(tmp_path / "images", per_class=6)
    re_encode(root / "cat.0.jpg", root / "cat.100.jpg")
    folds = [prepare(tmp_path, folds=3, fold=k) for k in (1, 2, 3)]
    assert sorted(path for data in folds for path in data.val.paths) == sorted(both(folds[0]))
    for data in folds:
        assert not set(data.train.paths) & set(data.val.paths)
        assert ("cat.0.jpg" in data.val.paths) == ("cat.100.jpg" in data.val.paths)
    assert len({data.content_digest for data in folds}) == 1
    assert len({data.digest for data in folds}) == 3
    assert len({data.val.digest() for data in folds}) == 3
    assert folds[0].val.digest() == prepare(tmp_path, folds=3, fold=1).val.digest()
    (root / "cat.1.jpg").rename(root / "cat.7.jpg")
    assert prepare(tmp_path, folds=3, fold=1).content_digest != folds[0].content_digest


def test_a_label_file_may_set_images_aside_for_validation(tmp_path: Path) -> None:
    root = flat_set(tmp_path / "images")
    parts = {f"{name}.{i}.png": "val" if i > 3 else "train" for name in ("cat", "dog") for i in range(6)}
    file = label_file(
        root, [f"{path},{path[:3]},{part}" for path, part in parts.items()], "path,label,split"
    )
    data = prepare(tmp_path, file)
    assert set(data.val.paths) == {path for path, part in parts.items() if part == "val"}
    assert set(data.train.paths) == {path for path, part in parts.items() if part == "train"}
    exclude = label_file(tmp_path / "m", ["cat.5.png", "cat.0.png"], "path")
    assert len(both(prepare(tmp_path, file, exclude=str(exclude)))) == 10
    with pytest.raises(ValueError, match=r"--folds 3 .*column"):
        prepare(tmp_path, file, folds=3, fold=1)
    shutil.copy(root / "cat.0.png", root / "cat.5.png")
    (leak,) = [note for note in prepare(tmp_path, file).notes if note.startswith("warning: 1 images")]
    assert str(file) in leak
    rows = [f"{path},{path[:3]},{part}" for path, part in parts.items()]
    label_file(root, [*rows[:5], rows[5].replace(",cat", ",ant"), *rows[6:]], "path,label,split")
    with pytest.raises(UserError, match="'ant'") as error:
        prepare(tmp_path, file)
    assert "--val-data" not in str(error.value)


def test_soft_labels_of_validation_images_are_not_used(tmp_path: Path) -> None:
    names = ("ant", "bee", "cat")
    root = flat_set(tmp_path / "images", names=names)
    header = "path,label," + ",".join(f"probability_{name}" for name in names)
    rows = [f"{name}.{i}.png,{name},0.2,0.3,0.5" for name in names for i in range(6)]
    (tmp_path / "images" / "val.csv").write_text("\n".join([header, *rows[6:]]))
    data = prepare(tmp_path, label_file(root, rows, header), val_data=str(root / "val.csv"))
    assert data.val.targets is None
    assert data.val.counts() == {"ant": 0, "bee": 6, "cat": 6}


def test_columns_have_no_effect_without_a_label_file(tmp_path: Path) -> None:
    root = flat_set(tmp_path / "images")
    with pytest.raises(ValueError, match=r"--columns id,breed has no effect"):
        prepare(tmp_path, columns="id,breed")
    members = {
        f"{name}/{i}.png": (root / f"{name}.{i}.png").read_bytes()
        for name in ("cat", "dog")
        for i in range(6)
    }
    with pytest.raises(ValueError, match=r"--columns id,breed has no effect"):
        prepare(tmp_path, make_tar(tmp_path / "x.tar", members), columns="id,breed")
    file = label_file(
        root, [f"{n}.{i}.png,{n},x{i % 2}" for n in ("cat", "dog") for i in range(6)], "f,a,b"
    )
    assert prepare(tmp_path, file, columns="f,b").train.class_names == ("x0", "x1")


def test_excluded_images_are_left_out_and_others_keep_their_side(tmp_path: Path) -> None:
    flat_set(tmp_path / "images", per_class=40)
    before = prepare(tmp_path)
    leave = [before.val.paths[0], *before.train.paths[:2]]
    file = label_file(tmp_path / "m", [f"{path},cat,0.3" for path in leave], "path,label,score")
    data = prepare(tmp_path, exclude=str(file))
    assert set(both(before)) - set(both(data)) == set(leave)
    assert len(set(before.val.paths) - set(data.val.paths)) <= 2
    assert any(note.startswith("3 ") and str(file) in note for note in data.notes)


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (
            ["cat.0.png", "nowhere.png"],
            "path",
            r"--exclude .* 1 images .*nowhere.png",
        ),
        (["cat.0.png"], "file", r"--exclude .* column path.*\['file'\]"),
        ([f"cat.{i}.png" for i in range(6)], "path", r"class 'cat' .*--exclude"),
    ],
)
def test_a_faulty_exclude_file_is_an_error_that_names_it(
    tmp_path: Path, rows: list[str], header: str, message: str
) -> None:
    flat_set(tmp_path / "images")
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, exclude=str(label_file(tmp_path / "m", rows, header)))


def test_an_exclude_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    flat_set(tmp_path / "images")
    with pytest.raises(ValueError, match=r"--exclude nowhere.csv .*No such file"):
        prepare(tmp_path, exclude="nowhere.csv")


# split


def halves(images: ImageSet, fraction: float = 0.2, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    return split(images, TrainConfig(val_fraction=fraction, seed=seed), {}, [])


def test_the_split_is_stratified() -> None:
    images = image_set([0] * 100 + [1] * 40 + [2] * 10, 3)
    train, val = halves(images)
    assert val.counts() == {"class0": 20, "class1": 8, "class2": 2}
    assert set(train.paths) | set(val.paths) == set(images.paths)
    assert len(train) + len(val) == 150


def test_the_split_is_a_function_of_content_and_seed() -> None:
    images = image_set([0, 1] * 50)
    order = np.random.default_rng(0).permutation(100)
    assert set(halves(images.take(order))[1].paths) == set(halves(images)[1].paths)
    assert set(halves(images, seed=1)[1].paths) != set(halves(images)[1].paths)


def test_adding_images_moves_few() -> None:
    many = image_set([0, 1] * 550)
    _, before = halves(many.take(np.arange(1000)))
    _, after = halves(many)
    gone = set(before.paths) - set(after.paths)
    assert len(gone) < 0.02 * 1000


label_and_content = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=2, max_size=60)


@given(label_and_content, st.floats(0.05, 0.9), st.integers(0, 5))
@hypothesis_settings(max_examples=300, deadline=None)
def test_copies_never_straddle_and_every_class_can_be_trained(
    rows: list[tuple[int, int]], fraction: float, seed: int
) -> None:
    labels = [label for label, _ in rows]
    images = image_set(labels, 3, [f"hash{content}" for _, content in rows])
    known = {content: {label for label, other in rows if other == content} for _, content in rows}
    clear = Counter(min(labels) for labels in known.values() if len(labels) == 1)
    if max(clear.values(), default=0) < 2:
        with pytest.raises(UserError):
            halves(images, fraction, seed)
        return
    train, val = halves(images, fraction, seed)
    assert not set(train.sha256) & set(val.sha256)
    assert sorted(train.paths + val.paths) == sorted(images.paths)
    assert len(val) > 0
    assert set(train.labels.tolist()) == set(labels)


def test_copies_contradictions_and_classes_without_validation_are_reported() -> None:
    images = image_set([0, 0, 0, 1, 1, 2, 0], 3, ["a", "a", "b", "c", "b", "d", "e"])
    notes: list[str] = []
    split(images, TrainConfig(val_fraction=0.2), {}, notes)
    assert "copies of others: 2;" in notes[0]
    assert notes[1].startswith("warning: 1 pictures")
    assert any(note.startswith("warning: ") and "'class2'" in note for note in notes)


# digest


ROWS = ["a.png,cat", "b.png,cat", "c.png,dog", "d.png,dog"]


def digest(tmp_path: Path, rows: list[str] = ROWS, redrawn: str = "") -> str:
    """Digest of a label file of four images, with validation images that stay as they are."""
    root = tmp_path / "m"
    for i, row in enumerate(rows):
        path = row.split(",")[0]
        draw(root / path, i, 99 if path == redrawn else 0)
    val = label_file(flat_set(tmp_path / "val"), ["cat.1.png,cat", "dog.1.png,dog"])
    return prepare(tmp_path, label_file(root, rows), val_data=str(val)).digest


@pytest.mark.parametrize(
    ("rows", "redrawn"),
    [
        (["a.png,cat", "b.png,cat", "bc.png,dog", "d.png,dog"], ""),
        (["a.png,cat", "b.png,dog", "c.png,dog", "d.png,dog"], ""),
        (ROWS, "b.png"),
        ([*ROWS, "e.png,cat"], ""),
        (ROWS[:3], ""),
    ],
    ids=["name", "label", "content", "one more", "one less"],
)
def test_the_digest_changes_with_names_labels_and_contents(
    tmp_path: Path, rows: list[str], redrawn: str
) -> None:
    assert digest(tmp_path, rows, redrawn) != digest(tmp_path)


def test_the_digest_does_not_depend_on_the_order_of_a_label_file(tmp_path: Path) -> None:
    before = digest(tmp_path)
    root = tmp_path / "m"
    reordered = label_file(root, ROWS[::-1])
    assert prepare(tmp_path, reordered, val_data=str(tmp_path / "val" / "labels.csv")).digest == before


def test_the_digest_stays_when_the_data_move(tmp_path: Path) -> None:
    flat_set(tmp_path / "images")
    before = prepare(tmp_path).digest
    shutil.copytree(tmp_path / "images", tmp_path / "copy")
    os.utime(tmp_path / "images" / "cat.0.png")
    assert prepare(tmp_path).digest == before
    assert prepare(tmp_path, tmp_path / "copy").digest == before


def test_balanced_class_weights_have_mean_1_over_the_images() -> None:
    images = image_set([0] * 6 + [1] * 2)
    weights = class_weights(images)
    assert weights == [8 / 12, 8 / 4]
    assert np.mean([weights[label] for label in images.labels]) == 1


def test_two_processes_agree_on_classes_that_look_alike(tmp_path: Path) -> None:
    config = TrainConfig(data=str(flat_set(tmp_path / "images", names=("a1", "a01", "a001"))))
    assert prepare_data(config.replace(output=str(tmp_path))).train.class_names == ("a001", "a01", "a1")

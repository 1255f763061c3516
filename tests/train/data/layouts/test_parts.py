"""Parts of a data set are not trained as classes, and classes that are called as parts are stay classes."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from serve.contract.errors import UserError
from train.data.layouts.folder_tree import Folder
from train.data.layouts.parts import DataSource, check_folders
from train.data.layouts.registry import find_labels

CLASSES = ("cat", "dog", "owl")
FLAT = tuple(f"{i}.jpg" for i in range(4))
NESTED = tuple(f"{name}/{i}.jpg" for name in CLASSES for i in range(2))
KAGGLE = tuple(f"{name}.{i}.jpg" for name in CLASSES for i in range(2))


Paths = dict[str, list[str]]  # folder -> images below it


def each(names: Sequence[str], paths: Sequence[str]) -> Paths:
    return {name: list(paths) for name in names}


def checked(folders: Paths, flag: str = "--data") -> tuple[list[str], list[str]]:
    """(facts, warnings)"""
    return check_folders(
        {name: Folder.of(paths) for name, paths in folders.items()}, DataSource("set", flag)
    )


def refusal(folders: Paths, flag: str = "--data") -> str:
    with pytest.raises(UserError) as raised:
        checked(folders, flag)
    return str(raised.value)


@pytest.mark.parametrize(
    ("names", "paths"),
    [
        (("test", "train"), FLAT),
        (("images_train", "images_val"), FLAT),
        (("train2017", "val2017"), FLAT),
        (("testset", "trainset"), NESTED),
        (("TestImages", "TrainImages"), FLAT),
        (("X_test", "X_train"), NESTED),
        (("cats_test", "cats_train"), FLAT),
        (("test set", "Training Set"), NESTED),
        (("test_cats", "test_dogs", "train_cats", "train_dogs"), FLAT),
        (("holdout", "train"), FLAT),
        (("testA", "testB", "trainA", "trainB"), FLAT),
        (("PrivateTest", "PublicTest", "Training"), NESTED),
        (("검증", "훈련"), FLAT),
        (("测试集", "训练集"), FLAT),
        (("test1", "train"), KAGGLE),
        (("fold1", "fold2", "fold3"), FLAT),
        (("images_001", "images_002"), FLAT),
        (("HAM_images_part_1", "HAM_images_part_2"), FLAT),
        (("rps", "rps-test-set"), NESTED),
        (("part_1", "part_2"), NESTED),
        (("part1", "part2"), KAGGLE),
        (("Batch A", "Batch B"), NESTED),
        (("color", "grayscale", "segmented"), NESTED),
        (("backup", "data"), NESTED),
        (("train1", "train2"), FLAT),
        (("training", "trainval"), FLAT),
        (("depth_preview", "rgb"), FLAT),
        (("images", "images_mask"), FLAT),
        (("originals", "overlay"), FLAT),
        (("color", "grayscale", "segmented"), FLAT),
        (("heatmap", "photos"), ("day/1.jpg", "day/2.jpg")),
    ],
)
def test_parts_and_variants_of_a_data_set_are_refused(names: Sequence[str], paths: Sequence[str]) -> None:
    message = refusal(each(names, paths))
    assert "--data " in message
    assert all(repr(name) in message for name in names)


@pytest.mark.parametrize(
    "names",
    [
        ("bus", "car", "train"),
        ("control", "test"),
        ("mask", "no_mask"),
        ("part", "whole"),
        ("part_1", "part_2"),
        ("batch1", "batch2"),
        ("images of cats", "images of dogs"),
        ("invalid", "valid"),
        ("test1", "test2"),
        ("crash", "crash test"),
        ("bullet_train", "steam_train"),
        ("bullet train", "test tube"),
        ("center", "depth", "edge"),
        ("evaluation", "training shoe"),
        ("bottle", "label"),
        ("old", "new"),
        ("color", "gray"),
        ("figures", "tables"),
        ("cat", "images", "masks"),
        ("0", "1", "2"),
        ("개", "고양이"),
    ],
)
@pytest.mark.parametrize("paths", [FLAT, ("IMG_1.jpg", "x.jpg", "day/1.jpg", "night/1.jpg")])
def test_classes_that_are_called_so_stay_classes_without_a_word(
    names: Sequence[str], paths: Sequence[str]
) -> None:
    assert checked(each(names, paths)) == ([], [])


@pytest.mark.parametrize("names", [("cat", "dog"), ("bus", "train"), ("new", "old"), ("1", "2")])
def test_variants_in_every_class_are_named_and_no_warning(names: Sequence[str]) -> None:
    (fact,), warnings = checked(each(names, ["batch_1/1.jpg", "batch_2/1.jpg"]))
    assert f"'{names[0]}/batch_1', '{names[1]}/batch_1'" in fact
    assert warnings == []


@pytest.mark.parametrize("inner", [("dog", "horse"), ("day", "night"), ("0", "1")])
def test_folders_of_the_same_names_in_every_class_may_be_the_classes(inner: Sequence[str]) -> None:
    domains = each(("photo", "sketch"), [f"{name}/1.jpg" for name in inner])
    facts, (warning,) = checked(domains)
    assert facts == []
    assert f"'photo/{inner[0]}', 'sketch/{inner[0]}'" in warning
    assert "label file" in warning
    assert warning.endswith("--data set/photo")
    trees = {name: Folder.of(paths) for name, paths in domains.items()}
    _, (warning,) = check_folders(trees, DataSource("set", in_tars=True))
    assert "tar -C photo -cf photo.tar ." in warning


def test_folders_of_other_names_in_most_classes_may_be_the_classes() -> None:
    scenes = {
        "a": ["abbey/1.jpg", "airport/1.jpg"],
        "b": ["bar/1.jpg", "basketball_court/outdoor/1.jpg"],
        "q": ["quarry/1.jpg"],
    }
    facts, (warning,) = checked(scenes)
    assert facts == []
    assert "'a/abbey', 'b/bar'" in warning
    assert warning.endswith("--data set/a")
    assert checked({**scenes, "q": ["1.jpg"]}) == ([], [])
    assert checked({"cat": ["1/1.jpg", "2/1.jpg"], "dog": ["3/1.jpg"], "owl": ["4/1.jpg"]}) == ([], [])


def test_a_folder_beside_parts_does_not_hide_them() -> None:
    parts = each(("train", "val"), NESTED)
    for name, paths in {
        "copy": [f"{part}/{path}" for part in parts for path in NESTED],
        "extra": list(FLAT),
        "bus": list(FLAT),
    }.items():
        assert "--data set/train --val-data set/val;" in refusal({**parts, name: paths})


def test_parts_whose_content_does_not_show_it_are_classes_beside_another_class_with_a_warning() -> None:
    _, (warning,) = checked(each(("bus", "test", "train"), FLAT))
    assert "'test', 'train'" in warning
    assert "--data" in warning
    for name in ("test_images", "pred", "unlabeled"):
        _, (warning,) = checked(each(("cat", "dog", name), FLAT))
        assert repr(name) in warning


@pytest.mark.parametrize(
    ("folders", "flags"),
    [
        (
            {"seg_pred": ["seg_pred/1.jpg"], "seg_test": [f"seg_test/{path}" for path in NESTED]}
            | {"seg_train": [f"seg_train/{path}" for path in NESTED]},
            "--data set/seg_train/seg_train --val-data set/seg_test/seg_test;",
        ),
        (each(("test", "train", "valid"), NESTED), "--data set/train --val-data set/valid;"),
        ({"test1": list(FLAT), "train": list(KAGGLE)}, "--data set/train;"),
        ({"a b": [f"{part}/{path}" for part in ("test", "train") for path in NESTED], "cat": list(FLAT)},)
        + ("--data 'set/a b/train' --val-data 'set/a b/test', ",),
        ({"masks": list(NESTED), "photos": list(NESTED)}, "--data set/photos;"),
        (each(("depth_preview", "rgb"), FLAT), "--data set/rgb;"),
        ({"masks": ["1_mask.png", "2_mask.png"], "photos": ["1.jpg", "2.jpg"]}, "--data set/photos;"),
        (each(("originals", "masks", "photos"), FLAT) | {"originals": ["x.jpg"]}, "--data set/photos;"),
        ({"test_stg1": list(FLAT), "train": list(NESTED)}, "--data set/train;"),
        (each(("train_mini", "val"), NESTED), "--data set/train_mini --val-data set/val;"),
        (
            {"zoo_testset": ["zoo_testset/cat_1.jpg"], "zoo_dataset": list(NESTED)},
            "--data set/zoo_dataset;",
        ),
        ({"labeled": list(NESTED), "unlabeled": ["00/1.jpg", "00/2.jpg"]}, "--data set/labeled;"),
    ],
)
def test_the_folders_to_give_are_named(folders: Paths, flags: str) -> None:
    assert flags in refusal(folders)


def test_of_validation_data_the_part_to_validate_on_is_named() -> None:
    message = refusal(each(("train", "val"), NESTED), "--val-data")
    assert "--val-data set/val;" in message
    assert "--data" not in message.replace("--val-data", "")


@pytest.mark.parametrize(
    ("folders", "flags"),
    [
        ({"PetImages": list(NESTED)}, "--data set/PetImages"),
        ({"archive": [f"PetImages/{path}" for path in NESTED]}, "--data set/archive/PetImages"),
        ({"images": list(KAGGLE)}, "--data set/images"),
        (
            {"x": [f"{part}/{path}" for part in ("train", "val") for path in NESTED]},
            "--data set/x/train --val-data set/x/val",
        ),
    ],
)
def test_in_one_folder_the_folder_inside_is_named(folders: Paths, flags: str) -> None:
    assert refusal(folders).endswith(flags)
    assert checked({"cat": list(FLAT)}) == ([], [])


def test_parts_inside_of_every_class_are_warned_of() -> None:
    paths = [f"{part}/{i}.jpg" for part in ("train", "test") for i in range(3)]
    others = {"cat": paths, "dog": [path.replace("test/", "val/") for path in paths]}
    for folders, named in ((each(("cat", "dog"), paths), "'dog/test'"), (others, "'dog/train'")):
        _, (warning,) = checked(folders)
        assert f"'cat/test', {named}" in warning


def test_images_and_masks_of_other_names_are_classes() -> None:
    assert checked({"images": ["a.jpg", "b.jpg", "c.jpg"], "masks": ["1.jpg", "2.jpg", "c.jpg"]}) == (
        [],
        [],
    )


def test_a_training_part_alone_is_no_validation_data() -> None:
    assert "--val-data set/train2;" in refusal({"train2": list(FLAT)}, "--val-data")


def test_data_sets_beside_each_other_are_no_classes() -> None:
    paths = [f"{part}/{path}" for part in ("train", "test") for path in NESTED]
    message = refusal(each(("berlin", "paris"), paths))
    assert "--data set/berlin/train --val-data set/berlin/test, " in message


def test_a_copy_of_the_classes_beside_them_is_no_class() -> None:
    copy = {"Village": [f"Village/{path}" for path in NESTED]}
    assert "--data set/Village/Village, " in refusal(each(CLASSES, FLAT) | copy)
    checked(each(CLASSES, FLAT) | {"mixed": ["cat/1.jpg", "wolf/1.jpg", "lynx/1.jpg"]})


def test_parts_in_folders_are_refused_whatever_is_beside_them(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for path in NESTED:
            (tmp_path / part / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / part / path).touch()
    (tmp_path / "__MACOSX" / "train").mkdir(parents=True)
    (tmp_path / "annotations").mkdir()
    for data_format in ("auto", "folders"):
        with pytest.raises(UserError, match=f"--data {tmp_path}/train --val-data {tmp_path}/test"):
            find_labels(tmp_path, data_format)

"""Values of a column as paths, names and numbers of images, in the folders where people have them."""

import os
import unicodedata
from pathlib import Path

import pytest

from serve.contract.errors import UserError
from serve.contract.image_files import ImageFiles


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def located(root: Path, values: list[str], table: str = "labels.csv", part: str = "train") -> list[str]:
    files = ImageFiles(str(root / table), part)
    naming, count = files.locate(values)
    assert count == len(values)
    return [files.path_of(value, naming) for value in values]


NAMES = [f"{i:03}" for i in range(8)]


@pytest.mark.parametrize(
    ("values", "paths"),
    [
        (["{}.jpg", "./{}.jpg"], "{}.jpg"),
        (["{}"], "{}.jpg"),
        (["{}"], "train/{}.png"),
        (["{}.png"], "train/train/{}.png"),
        (["train/{}"], "set/train/{}.JPG"),
        (["Photos\\{}.jpg "], "photos/{}.JPG"),
        (["C:\\Users\\a\\set\\train\\{}.jpg", "C:\\Users\\a\\set\\train\\{}"], "train/{}.jpg"),
        (["/content/drive/x/{}.jpg"], "{}.jpg"),
        (["../images/{}.jpg"], "../images/{}.jpg"),
        (["{}"], "../images/{}.jpg"),
        (["/a/{}.jpg"], "data_256/a/{}.jpg"),
        (["/data/local-files/?d=my%20images/{}.jpg"], "my images/{}.jpg"),
        (["/data/local-files/?d={}.jpg"], "images/{}.jpg"),
    ],
)
def test_one_rule_for_all_values_is_found(tmp_path: Path, values: list[str], paths: str) -> None:
    root = tmp_path / "set"
    root.mkdir()
    touch(root, *(paths.format(name) for name in NAMES), "other/x.jpg")
    listed = [values[i % len(values)].format(name) for i, name in enumerate(NAMES)]
    found = located(root, listed)
    assert [os.path.normpath(path) for path in found] == [paths.format(name) for name in NAMES]


def test_photographs_come_before_masks_of_the_same_names(tmp_path: Path) -> None:
    root = tmp_path / "annotations"
    touch(root, *(f"trimaps/{name}.png" for name in NAMES))
    touch(root, *(f"../images/{name}.jpg" for name in NAMES))
    assert located(root, NAMES) == [f"../images/{name}.jpg" for name in NAMES]


def test_a_few_images_in_a_second_folder_are_found(tmp_path: Path) -> None:
    names = [f"{i:03}.jpg" for i in range(40)]
    paths = [f"{'val' if i % 10 == 9 else 'train'}/{name}" for i, name in enumerate(names)]
    touch(tmp_path, *paths)
    assert located(tmp_path, names) == paths


def test_a_sample_submission_never_takes_the_training_images(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{name}.jpg" for name in NAMES))
    with pytest.raises(UserError, match="'train/'"):
        located(tmp_path, NAMES, "sample_submission.csv", "test")
    touch(tmp_path, *(f"test/{name}.jpg" for name in NAMES))
    assert located(tmp_path, NAMES, "sample_submission.csv", "test") == [
        f"test/{name}.jpg" for name in NAMES
    ]


def test_names_in_several_folders_and_with_several_suffixes_are_found(tmp_path: Path) -> None:
    paths = [f"train_images/{'ab'[i % 2]}/{name}{('.jpg', '.png')[i // 4]}" for i, name in enumerate(NAMES)]
    touch(tmp_path, *paths)
    assert located(tmp_path, NAMES) == paths
    assert located(tmp_path, [Path(path).name for path in paths]) == paths


def test_a_composed_name_stands_for_a_decomposed_one(tmp_path: Path) -> None:
    names = [f"caf\u00e9{i}.jpg" for i in range(4)]
    on_disk = [unicodedata.normalize("NFD", name) for name in names]
    touch(tmp_path, *on_disk)
    assert located(tmp_path, names) == on_disk


def test_a_number_with_other_zeros_is_another_name(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{i:04}.jpg" for i in range(1, 9)))
    assert ImageFiles(str(tmp_path / "l.csv"), "train").locate([str(i) for i in range(1, 9)])[1] == 0


def test_of_two_parts_with_the_same_names_that_of_the_table_is_taken(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{part}/{name}.png" for part in ("train", "test") for name in NAMES))
    assert located(tmp_path, NAMES)[0] == "train/000.png"
    assert located(tmp_path, NAMES, part="test")[0] == "test/000.png"
    assert located(tmp_path, NAMES, "trainLabels.csv", part="test")[0] == "train/000.png"
    assert located(tmp_path, NAMES, "test_labels.csv")[0] == "test/000.png"


def test_parts_may_be_further_down(tmp_path: Path) -> None:
    touch(tmp_path, *(f"set/{part}/{name}.png" for part in ("test", "train") for name in NAMES))
    assert located(tmp_path, NAMES)[0] == "set/train/000.png"
    assert located(tmp_path, NAMES, "test.csv")[0] == "set/test/000.png"


def test_images_of_the_test_part_are_none_of_a_table_of_training(tmp_path: Path) -> None:
    touch(tmp_path, *(f"test/{name}.png" for name in NAMES))
    assert ImageFiles(str(tmp_path / "train.csv"), "train").locate(NAMES)[1] == 0
    assert located(tmp_path, NAMES, "labels.csv")[0] == "test/000.png"


def test_a_folder_of_the_usual_name_is_taken_before_another_and_two_others_are_an_error(
    tmp_path: Path,
) -> None:
    touch(tmp_path, *(f"{folder}/{name}.png" for folder in ("crops", "small") for name in NAMES))
    with pytest.raises(UserError, match=r"labels.csv: '000' .*'crops/000.png' .*'small/000.png'"):
        located(tmp_path, NAMES)
    touch(tmp_path, *(f"images{size}/{name}.png" for size in ("", "_224") for name in NAMES))
    assert located(tmp_path, NAMES)[0] == "images/000.png"
    touch(tmp_path, *(f"train{size}/{name}.png" for size in ("", "_224") for name in NAMES))
    assert located(tmp_path, NAMES)[0] == "train/000.png"


def test_a_photograph_and_its_mask_of_one_name_are_an_error(tmp_path: Path) -> None:
    touch(tmp_path, *(f"images/{name}{suffix}" for suffix in (".png", ".jpg") for name in NAMES))
    with pytest.raises(UserError, match=r"'images/000.jpg' .*'images/000.png'"):
        located(tmp_path, NAMES)


def test_an_absent_folder_is_not_replaced_by_another_part(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{name}.png" for name in NAMES))
    values = [f"val/{name}.png" for name in NAMES]
    assert ImageFiles(str(tmp_path / "val.csv"), "val").locate(values)[1] == 0
    assert ImageFiles(str(tmp_path / "train" / "val.csv"), "val").locate(values)[1] == 0
    in_train = [value.replace("val", "train") for value in values]
    assert located(tmp_path / "train", in_train)[0] == "000.png"


def test_a_linked_folder_is_followed(tmp_path: Path) -> None:
    touch(tmp_path / "far", *(f"{name}.png" for name in NAMES))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to("../far")
    assert located(tmp_path / "set", NAMES)[0] == "train/000.png"

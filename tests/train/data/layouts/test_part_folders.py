"""A folder of parts is trained and validated on its parts, where it is certain which part is for what."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from tar_files import make_tar
from train_data import draw, flat_set, settings

from serve.contract.errors import UserError
from train.data.index import prepare_data
from train.data.layouts.part_folders import take_parts
from train.engine.prepare import prepare
from train.runs.directory import create_run_folder


def classes(folder: Path, names: Sequence[str] = ("cat", "dog"), count: int = 3, start: int = 0) -> Path:
    for label, name in enumerate(names):
        for i in range(start, start + count):
            draw(folder / name / f"{i}.png", label, i)
    return folder


def unlabelled(folder: Path) -> Path:
    for i in range(3):
        draw(folder / f"{i}.png", 0, 90 + i)
    return folder


def taken(root: Path, **changes: str | int) -> tuple[str, str, list[str]]:
    """(training part and validation part relative to the root, notes)"""
    config, notes = take_parts(settings(root, data=str(root), **changes))
    return config.data.removeprefix(f"{root}/"), config.val_data.removeprefix(f"{root}/"), notes


@pytest.mark.parametrize(
    ("train_part", "val_part"),
    [
        ("train", "val"),
        ("train", "valid"),
        ("Training", "validation"),
        ("train2017", "val2017"),
        ("seg_train", "seg_test"),
        ("images/train", "images/test"),
        ("train/train", "test/test"),
        ("训练集", "测试集"),
    ],
)
def test_the_training_part_trains_and_the_other_one_validates(
    tmp_path: Path, train_part: str, val_part: str
) -> None:
    classes(tmp_path / train_part)
    classes(tmp_path / val_part, start=50)
    data, val_data, (note,) = taken(tmp_path)
    assert (data, val_data) == (train_part, val_part)
    assert all(repr(Path(part).name) in note for part in (train_part, val_part))


def test_a_label_file_that_gives_other_classes_comes_before_parts(tmp_path: Path) -> None:
    for part, start in (("train", 0), ("val", 50)):
        classes(tmp_path / part, names=("000", "001"), start=start)
    images = sorted((tmp_path / "train").rglob("*.png"))
    rows = [f"{path.relative_to(tmp_path)},{('cat', 'dog')[i % 2]}" for i, path in enumerate(images)]
    (tmp_path / "train.csv").write_text("\n".join(["path,label", *rows]))
    assert taken(tmp_path)[:2] == (str(tmp_path), "")
    with pytest.raises(UserError, match=r"train\.csv"):
        prepare_data(settings(tmp_path, data=str(tmp_path)))
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in images]
    (tmp_path / "train.csv").write_text("\n".join(["path,label", *rows]))
    assert taken(tmp_path)[:2] == ("train", "val")


def test_parts_are_found_in_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "val", start=50)
    monkeypatch.chdir(tmp_path)
    config, _ = take_parts(settings(tmp_path, data="."))
    assert (config.data, config.val_data) == ("train", "val")


@pytest.mark.parametrize("has_labels", [True, False])
def test_a_test_part_beside_train_and_val_is_not_used(tmp_path: Path, has_labels: bool) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "val", start=50)
    (classes if has_labels else unlabelled)(tmp_path / "test")
    data, val_data, (note,) = taken(tmp_path)
    assert (data, val_data) == ("train", "val")
    assert "'test'" in note


def test_a_test_part_without_labels_validates_nothing(tmp_path: Path) -> None:
    flat_set(tmp_path / "train")
    unlabelled(tmp_path / "test1")
    data, val_data, (note,) = taken(tmp_path)
    assert (data, val_data) == ("train", "")
    assert "'test1'" in note


def test_a_folder_that_is_no_part_is_named_in_a_warning(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "val", start=50)
    classes(tmp_path / "copy" / "train")
    _, _, (_, warning) = taken(tmp_path)
    assert warning.startswith("warning: ")
    assert "'copy'" in warning


def test_tar_files_and_names_hold_the_classes_of_parts_too(tmp_path: Path) -> None:
    for part, start in (("train", 0), ("val", 50)):
        folder = classes(tmp_path / "images" / part, start=start)
        members = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}
        make_tar(tmp_path / "tars" / part / "0.tar", members)
        flat_set(tmp_path / "flat" / part)
    for kind in ("tars", "flat"):
        assert taken(tmp_path / kind)[:2] == ("train", "val")


@pytest.mark.parametrize(
    "folders",
    [
        {"train1": True, "train2": True, "val": True},
        {"train": True, "trainval": True, "val": True},
        {"train": False, "val": True},
        {"train": True},
        {"train": True, "X_val": True},
        {"train": True, "test": False, "other": True},
        {"cat": False, "dog": False},
    ],
    ids=str,
)
def test_what_is_not_certain_is_left_to_the_layouts(tmp_path: Path, folders: dict[str, bool]) -> None:
    for name, has_labels in folders.items():
        (classes if has_labels else unlabelled)(tmp_path / name)
    before = settings(tmp_path, data=str(tmp_path))
    assert take_parts(before) == (before, [])


def test_a_part_that_cannot_validate_is_an_error_with_the_flags_of_a_split(tmp_path: Path) -> None:
    classes(tmp_path / "train", ("n01440764", "n01443537"))
    for i in range(3):
        draw(tmp_path / "val" / f"ILSVRC2012_val_0000000{i}.png", 0, i)
    split = f"--data {tmp_path}/train"
    with pytest.raises(UserError, match=split):
        taken(tmp_path)
    shutil.rmtree(tmp_path / "val")
    classes(tmp_path / "val", ("n01440764", "n99999999"))
    with pytest.raises(UserError, match=f"'n99999999'.*{split}"):
        taken(tmp_path)
    shutil.rmtree(tmp_path / "val")
    classes(tmp_path / "val", ("n01440764",))
    with pytest.raises(UserError, match=split):
        taken(tmp_path)
    classes(tmp_path / "val", ("n01440764", "n01443537"))
    classes(tmp_path / "valid", ("n01440764", "n01443537"))
    with pytest.raises(UserError, match=f"{split} --val-data {tmp_path}/val"):
        taken(tmp_path)


def test_flags_that_contradict_the_parts_are_errors_with_the_flags_to_give(tmp_path: Path) -> None:
    root = tmp_path / "set"
    classes(root / "train")
    classes(root / "val", start=50)
    other = classes(tmp_path / "other")
    flags = f"--data {root}/train --val-data {other}"
    with pytest.raises(UserError, match=flags):
        taken(root, val_data=str(other))
    with pytest.raises(UserError, match=f"--data {root}/train --folds 3"):
        taken(root, folds=3, fold=1)
    shutil.rmtree(root / "val")
    unlabelled(root / "test")
    assert taken(root, val_data=str(other))[:2] == ("train", str(other))
    assert taken(root, folds=3, fold=1)[:2] == ("train", "")


def test_the_parts_are_the_data_of_the_same_flags(tmp_path: Path) -> None:
    root = tmp_path / "set"
    classes(root / "train")
    classes(root / "val", start=50)
    config, data = prepare(settings(tmp_path, data=str(root), val_fraction=0.3))
    named = settings(tmp_path, data=str(root / "train"), val_data=str(root / "val"))
    assert data.digest == prepare_data(named).digest
    assert (config.data, config.val_data) == (named.data, named.val_data)
    (warning,) = (note for note in data.notes if "--val-fraction" in note)
    assert warning.startswith("warning: ")
    shutil.copy(root / "train" / "cat" / "0.png", root / "val" / "cat" / "copy.png")
    _, data = prepare(settings(tmp_path, data=str(root)))
    assert any(note.startswith("warning: 1 ") and config.val_data in note for note in data.notes)


def test_a_run_on_parts_is_resumed_by_the_same_command(tmp_path: Path) -> None:
    root = tmp_path / "set"
    classes(root / "train")
    classes(root / "val", start=50)
    command = settings(tmp_path, data=str(root), name="x")
    config, data = prepare(command)
    create_run_folder(config, data)
    resumed = config.replace(resume=str(tmp_path / "runs" / "x"))
    assert prepare(command)[0] == resumed
    moved = root.rename(tmp_path / "moved")
    typed = resumed.replace(data=str(moved))  # the run's --val-data is the part where it was
    new = resumed.replace(data=str(moved / "train"), val_data=str(moved / "val"))
    assert prepare(typed)[0] == new

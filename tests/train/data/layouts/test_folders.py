"""Which folders of a data set are classes: system folders and our own output are not; nothing is lost."""

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from train_data import draw, flat_set

from serve.contract.errors import UserError
from train.checkpoint import last_checkpoint
from train.data.layouts.registry import find_labels

HEX = "0123456789abcdef" * 2


def folder_set(root: Path, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    for label, name in enumerate(names):
        for i in range(4):
            draw(root / name / f"{i}.png", label, i)
    return root


def counts(root: Path) -> dict[str, int]:
    return dict(Counter(find_labels(root, "auto").labels.values()))


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as raised:
        find_labels(root, "auto")
    return str(raised.value)


def write(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


SYSTEM = [
    "lost+found",
    "@eaDir",
    "#recycle",
    "__MACOSX",
    "$RECYCLE.BIN",
    ".Trash-1000",
    ".ipynb_checkpoints",
]
SYSTEM += ["System Volume Information", "@Recycle", ".snapshot"]


@pytest.mark.parametrize("make", [folder_set, flat_set])
def test_system_folders_are_left_out_with_a_line(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    before = counts(make(tmp_path / "images"))
    for name in SYSTEM:
        draw(tmp_path / "images" / name / "cat.0.jpg" / "thumb.jpg", 1, 9)
    found = find_labels(tmp_path / "images", "auto")
    assert counts(tmp_path / "images") == before
    assert f"{len(SYSTEM)} system folders" in found.layout
    assert found.warnings == []


def test_a_system_folder_inside_of_a_class_is_left_out(tmp_path: Path) -> None:
    root = folder_set(tmp_path)
    for name in ("@eaDir", "day/@eaDir", "#recycle"):
        draw(root / "cat" / name / "x.jpg")
    assert counts(root) == {"cat": 4, "dog": 4}
    assert "(@eaDir 2, #recycle 1)" in find_labels(root, "auto").layout


def test_names_that_only_resemble_a_system_folders_are_classes(tmp_path: Path) -> None:
    names = ("lost", "found", "recycle", "snapshot", "eaDir", "trash", "$5", "@home", "#1")
    assert set(counts(folder_set(tmp_path, names))) == set(names)


def write_run(folder: Path) -> None:
    write(folder / "config.yaml")
    write(folder / "metrics.jsonl")
    draw(folder / "figures" / "curves.png", 3)


def write_sample(root: Path) -> None:
    flat_set(root / "train")
    draw(root / "test" / "1.png")
    write(root / "test_labels.csv")


OUTPUTS: dict[str, Callable[[Path], object]] = {
    "runs": lambda path: write_run(path / "first"),
    "results": lambda path: write_run(path / "study" / "trial-1"),
    "first": write_run,
    "outputs": lambda path: write(path / ".cache" / "scan-0.json"),
    "mlruns": lambda path: draw(path / "1" / HEX / "artifacts" / "figures" / "curves.png", 3),
    "mlartifacts": lambda path: draw(path / "0" / "models" / f"m-{HEX}" / "artifacts" / "x.png", 3),
    "data": lambda path: write_sample(path / "sample"),
    "issues": lambda path: draw(write(path / "label_issues.csv").with_suffix(".png")),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("make", [folder_set, flat_set])
def test_what_this_program_wrote_is_no_class(
    tmp_path: Path, name: str, make: Callable[[Path], Path]
) -> None:
    before = counts(make(tmp_path))
    OUTPUTS[name](tmp_path / name)
    assert counts(tmp_path) == before
    found = find_labels(tmp_path, "auto")
    assert make is flat_set or repr(name) in found.layout
    assert found.warnings == []


def test_classes_called_as_our_folders_are_stay_classes(tmp_path: Path) -> None:
    names = ("runs", "figures", "export", "sample", "data of mine")
    assert set(counts(folder_set(tmp_path, names))) == set(names)


def test_a_folder_of_images_is_a_class_whatever_is_beside_them_in_it(tmp_path: Path) -> None:
    write_run(folder_set(tmp_path) / "cat" / "runs" / "first")
    assert set(counts(tmp_path)) == {"cat", "dog"}


def test_a_folder_of_runs_holds_no_classes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_run(tmp_path / name)
    assert "('first', 'second')" in refusal(tmp_path)


def test_the_drawn_sample_alone_is_named(tmp_path: Path) -> None:
    write_sample(tmp_path / "sample")
    assert refusal(tmp_path).endswith(f"--data {tmp_path}/sample/train")


def test_a_run_is_known_by_its_checkpoints_alone(tmp_path: Path) -> None:
    write(folder_set(tmp_path) / "first" / "config.yaml")
    write(last_checkpoint(tmp_path / "first"))
    assert counts(tmp_path) == {"cat": 4, "dog": 4}


def test_tar_files_beside_runs_are_still_the_data(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "first")
    write(tmp_path / "a.tar", b"\0" * 10240)
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert "tar files" in message
    assert "runs" not in message.replace(str(tmp_path), "")


def test_masks_beside_images_are_left_out_and_the_images_are_named(tmp_path: Path) -> None:
    for i in range(4):
        for name in ("beagle", "persian"):
            draw(tmp_path / "images" / f"{name}_{i}.png", name == "beagle", i)
            mask = draw(tmp_path / "masks" / f"{name}_{i}.png")
            Image.new("L", (24, 20), 255).save(mask)
    assert refusal(tmp_path).endswith(f"--data {tmp_path}/images")
    for image in (tmp_path / "images").glob("persian_*"):
        image.unlink()
    assert "'images'" in refusal(tmp_path)
    assert "(masks 8)" in refusal(tmp_path)
    (tmp_path / "images").rename(tmp_path / "cat")
    folder_set(tmp_path, ("dog", "owl"))
    assert counts(tmp_path) == {"cat": 4, "dog": 4, "owl": 4}
    (warning,) = find_labels(tmp_path, "auto").warnings
    assert "(masks 8)" in warning


# folders without images


@pytest.mark.parametrize(
    ("name", "data", "way_out"),
    [
        ("1.JXL", b"x", r"\(\.jxl 1\).*convert \.jxl"),
        ("all.zip", b"x", "unpack .zip"),
        ("1.mp4", b"x", "frames from .mp4"),
        ("1.xml", b"x", r"\(\.xml 1\).*move it"),
        ("0001", b"x", r"\(without a suffix 1\).*NAME\.jpg"),
    ],
)
def test_a_class_of_another_format_names_it_and_the_way_out(
    tmp_path: Path, name: str, data: bytes, way_out: str
) -> None:
    write(folder_set(tmp_path) / "owl" / name, data)
    message = refusal(tmp_path)
    assert repr(str(tmp_path / "owl")) in message
    assert re.search(way_out, message)
    assert "remove" not in message


def test_a_folder_of_one_archive_is_an_error_that_names_it(tmp_path: Path) -> None:
    write(tmp_path / "dogs.zip")
    assert re.search(r"\(\.zip 1\).*unpack \.zip", refusal(tmp_path))


# images that are not read, in a line


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("owls.zip", "unzip .*owls.zip"),
        ("owls.tar.gz", "gunzip"),
        ("owls.TAR", "tar -xf .*owls.TAR"),
        ("owls.7z", "7z x"),
        ("owls.rar", "unrar x"),
    ],
)
def test_archives_beside_class_folders_are_named(tmp_path: Path, name: str, command: str) -> None:
    write(folder_set(tmp_path) / name)
    write(tmp_path / "README.md")
    (tmp_path / "cat.zip").mkdir()
    draw(tmp_path / "cat.zip" / "1.png", 2)
    (warning,) = find_labels(tmp_path, "auto").warnings
    assert warning.startswith("1 ")
    assert re.search(command, warning)


def test_files_without_a_suffix_are_counted(tmp_path: Path) -> None:
    folder_set(tmp_path)
    for name in ("0001", "day/0002", ".hidden", "Thumbs.db"):
        write(tmp_path / "cat" / name)
    (warning,) = find_labels(tmp_path, "auto").warnings
    assert warning.startswith("2 ")
    assert "(without a suffix 2)" in warning


def test_hidden_class_folders_are_named(tmp_path: Path) -> None:
    folder_set(tmp_path, (".50 BMG", "9mm", ".22 LR", ".git", ".Trash-1", ".ipynb_checkpoints", "cat"))
    found = find_labels(tmp_path, "auto")
    assert set(found.labels.values()) == {"9mm", "cat"}
    assert "('.22 LR', '.50 BMG')" in found.layout
    draw(tmp_path / "rifles" / ".50 BMG" / "0.png")
    assert "('.50 BMG')" in refusal(tmp_path / "rifles")


# links


def test_linked_class_folders_are_followed(tmp_path: Path) -> None:
    folder_set(tmp_path / "store")
    (tmp_path / "set").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).symlink_to(f"../store/{name}")
    assert counts(tmp_path / "set") == {"cat": 4, "dog": 4}


def test_a_mounted_config_map_is_read_once(tmp_path: Path) -> None:
    folder_set(tmp_path / "..2026_01_31_10_00_00.123")
    (tmp_path / "..data").symlink_to("..2026_01_31_10_00_00.123")
    for name in ("cat", "dog"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    assert counts(tmp_path) == {"cat": 4, "dog": 4}


def test_linked_folders_inside_of_classes_name_the_cure(tmp_path: Path) -> None:
    folder_set(tmp_path / "store")
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "batch1").symlink_to("../../store/cat")
    assert re.search(r"'cat/batch1': .*label file", refusal(tmp_path / "set"))


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("nowhere/owl", ["owl'", "'nowhere/owl'"]),
        (".", ["'owl'", "'.'"]),
        ("cat", ["'cat'", "'owl'"]),
        ("cat/kittens", ["'cat'", "'owl'"]),
    ],
)
def test_a_link_that_would_cost_a_class_or_give_images_two_is_refused(
    tmp_path: Path, target: str, named: list[str]
) -> None:
    draw(folder_set(tmp_path) / "cat" / "kittens" / "1.png", 0, 9)
    os.symlink(target, tmp_path / "owl")
    message = refusal(tmp_path)
    assert "link" in message
    assert all(name in message for name in named)

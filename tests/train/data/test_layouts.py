"""Which folders of a data set are classes: system folders and our own output are not; nothing is lost."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from train_data import draw, flat_set

from train.data.index import find_labels

HEX = "0123456789abcdef" * 2
HEIC = b"\0\0\0\x24ftypheic\0\0\0\0mif1heic"


def folder_set(root: Path, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    for label, name in enumerate(names):
        for i in range(4):
            draw(root / name / f"{i}.png", label, i)
    return root


def counts(root: Path) -> dict[str, int]:
    return dict(Counter(find_labels(root, "auto")[1].values()))


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
    _, _, layout, problems = find_labels(tmp_path / "images", "auto")
    assert counts(tmp_path / "images") == before
    assert f"{len(SYSTEM)} system folders left out" in layout
    assert problems == []


def test_a_system_folder_inside_of_a_class_is_left_out(tmp_path: Path) -> None:
    root = folder_set(tmp_path)
    for name in ("@eaDir", "day/@eaDir", "#recycle"):
        draw(root / "cat" / name / "x.jpg")
    assert counts(root) == {"cat": 4, "dog": 4}
    assert "3 system folders left out (@eaDir 2, #recycle 1)" in find_labels(root, "auto")[2]


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


# images beside the folder `data` are ambiguous
@pytest.mark.parametrize(
    ("name", "make"),
    [(name, folder_set) for name in OUTPUTS] + [(name, flat_set) for name in OUTPUTS if name != "data"],
)
def test_what_this_program_wrote_is_no_class(
    tmp_path: Path, name: str, make: Callable[[Path], Path]
) -> None:
    before = counts(make(tmp_path))
    OUTPUTS[name](tmp_path / name)
    assert counts(tmp_path) == before
    _, _, layout, problems = find_labels(tmp_path, "auto")
    assert make is flat_set or repr(name) in layout
    assert problems == []


def test_classes_called_as_our_folders_are_stay_classes(tmp_path: Path) -> None:
    names = ("runs", "figures", "export", "sample", "data of mine")
    assert set(counts(folder_set(tmp_path, names))) == set(names)


def test_a_folder_of_runs_holds_no_classes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_run(tmp_path / name)
    with pytest.raises(ValueError, match=r"no class folders .*output of this program left out"):
        find_labels(tmp_path, "auto")


def test_the_drawn_sample_alone_is_named(tmp_path: Path) -> None:
    write_sample(tmp_path / "sample")
    with pytest.raises(ValueError, match=f"--data {tmp_path}/sample/train$"):
        find_labels(tmp_path, "auto")


def test_tar_files_beside_runs_are_still_the_data(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "first")
    write(tmp_path / "a.tar", b"\0" * 10240)
    with pytest.raises(ValueError, match=r"the tar files of .* hold no images"):
        find_labels(tmp_path, "auto")


def test_masks_beside_images_are_left_out_and_the_images_are_named(tmp_path: Path) -> None:
    for i in range(4):
        for name in ("beagle", "persian"):
            draw(tmp_path / "images" / f"{name}_{i}.png", name == "beagle", i)
            mask = draw(tmp_path / "masks" / f"{name}_{i}.png")
            Image.new("L", (24, 20), 255).save(mask)
    with pytest.raises(ValueError, match=f"the one folder of images 'images'.*--data {tmp_path}/images"):
        find_labels(tmp_path, "auto")
    for image in (tmp_path / "images").glob("persian_*"):
        image.unlink()
    with pytest.raises(ValueError, match=r"no class folders in .* but 'images'; .* left out .masks 8."):
        find_labels(tmp_path, "auto")
    (tmp_path / "images").rename(tmp_path / "cat")
    folder_set(tmp_path, ("dog", "owl"))
    assert counts(tmp_path) == {"cat": 4, "dog": 4, "owl": 4}
    assert (
        "8 masks or thumbnails of other images are left out (masks 8)" in find_labels(tmp_path, "auto")[3]
    )


# folders without images


@pytest.mark.parametrize(
    ("name", "data", "way_out"),
    [
        ("1.HEIC", HEIC, r"\(.heic 1\); convert .heic"),
        ("1.jxl", b"x", "convert .jxl"),
        ("all.zip", b"x", "unpack .zip"),
        ("1.mp4", b"x", "take frames from .mp4"),
        ("1.xml", b"x", r"\(.xml 1\); fill it, or move it out"),
    ],
)
def test_a_class_of_another_format_names_it_and_the_way_out(
    tmp_path: Path, name: str, data: bytes, way_out: str
) -> None:
    write(folder_set(tmp_path) / "owl" / name, data)
    with pytest.raises(ValueError, match=f"class folder .*owl' holds no images; .*{way_out}") as raised:
        find_labels(tmp_path, "auto")
    assert "remove" not in str(raised.value)


def test_a_folder_of_one_archive_says_so(tmp_path: Path) -> None:
    write(tmp_path / "dogs.zip")
    with pytest.raises(ValueError, match=r"holds no images, .*\(.zip 1\); unpack .zip"):
        find_labels(tmp_path, "auto")


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
    with pytest.raises(ValueError, match=r"'cat/batch1': linked folder, not followed: .* CSV manifest"):
        find_labels(tmp_path / "set", "auto")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere/owl", "owl' is a link to 'nowhere/owl', which is not there"),
        (".", "'owl' in .* is a link to a folder around it"),
        ("cat", "the folders 'cat' and 'owl' in .* are links to the same images"),
        ("cat/kittens", "the folders 'cat' and 'owl' in .* are links to the same images"),
    ],
)
def test_a_link_that_would_cost_a_class_or_give_images_two_is_refused(
    tmp_path: Path, target: str, message: str
) -> None:
    draw(folder_set(tmp_path) / "cat" / "kittens" / "1.png", 0, 9)
    os.symlink(target, tmp_path / "owl")
    with pytest.raises(ValueError, match=message):
        find_labels(tmp_path, "auto")

"""What --resume keeps are answers to the images as they are now."""

import os
import shutil
from pathlib import Path

import pytest
from serve_model import build_model, colour_of, encode, solid

from serve import main as serve_main

NUM_IMAGES = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for number in range(NUM_IMAGES):
        (root / f"{number:02}.bmp").write_bytes(encode(solid(colour_of(number)), "BMP"))  # all of one size
    (root / "list.txt").write_text("".join(f"{number:02}.bmp\n" for number in range(NUM_IMAGES)))
    return root


def score(model: Path, images: Path, output: Path, *arguments: str) -> int:
    fixed = ["--model", str(model), "--images", str(images), "--output", str(output), "--resume"]
    return serve_main.main([*fixed, "--batch-size", "1", "--part-size", "4", "--workers", "1", *arguments])


def kept(capsys: pytest.CaptureFixture[str]) -> int:
    """Rows that the call before did not score."""
    printed = capsys.readouterr().out
    return int(printed.split("errors, ")[1].split()[0]) if "from before" in printed else 0


def replace_keeping_size_and_time(path: Path, data: bytes) -> None:
    info = path.stat()
    assert info.st_size == len(data)
    path.write_bytes(data)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


@pytest.mark.parametrize("source", [".", "list.txt"])
def test_an_image_of_the_same_size_and_time_is_scored_anew(
    tmp_path: Path, model: Path, images: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    assert score(model, images / source, output) == 0
    before = output.read_text()
    assert score(model, images / source, output) == 0
    assert kept(capsys) == NUM_IMAGES
    replace_keeping_size_and_time(images / "05.bmp", encode(solid(colour_of(3)), "BMP"))
    assert score(model, images / source, output) == 0
    after = output.read_text()
    changed = [a != b for a, b in zip(before.splitlines(), after.splitlines(), strict=True)]
    assert [i - 1 for i, differs in enumerate(changed) if differs] == [5]
    assert score(model, images / source, output) == 0
    assert kept(capsys) == NUM_IMAGES


def test_after_a_kill_only_the_pieces_of_changed_images_are_scored_again(
    tmp_path: Path,
    model: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out.csv"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("serve.job.join", full)  # all pieces are there, the whole is not
        assert score(model, images, output) == 3
    replace_keeping_size_and_time(images / "05.bmp", encode(solid(colour_of(3)), "BMP"))
    capsys.readouterr()
    assert score(model, images, output) == 0
    assert kept(capsys) == NUM_IMAGES - 4


def test_a_copy_of_the_same_images_is_not_scored_again(
    tmp_path: Path, model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pod that starts on another machine has its images from somewhere else."""
    assert score(model, images, tmp_path / "out.csv") == 0
    images.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", images, copy_function=shutil.copy)
    capsys.readouterr()
    assert score(model, images, tmp_path / "out.csv") == 0
    assert kept(capsys) == NUM_IMAGES


def test_an_image_that_comes_back_is_scored(
    tmp_path: Path, model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (images / "05.bmp").read_bytes()
    (images / "05.bmp").unlink()
    assert score(model, images / "list.txt", tmp_path / "out.csv") == 0
    (images / "05.bmp").write_bytes(data)
    assert score(model, images / "list.txt", tmp_path / "out.csv") == 0
    assert "No such file" not in (tmp_path / "out.csv").read_text()


def test_a_tar_file_that_is_packed_anew_is_scored_anew(
    tmp_path: Path, model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = Path(shutil.make_archive(str(tmp_path / "a"), "tar", images))
    assert score(model, tar, tmp_path / "out.csv") == 0
    before = (tmp_path / "out.csv").read_bytes()
    assert score(model, tar, tmp_path / "out.csv") == 0
    assert kept(capsys) == NUM_IMAGES
    (images / "05.bmp").write_bytes(encode(solid(colour_of(3)), "BMP"))
    other = Path(shutil.make_archive(str(tmp_path / "b"), "tar", images))
    replace_keeping_size_and_time(tar, other.read_bytes())
    assert score(model, tar, tmp_path / "out.csv") == 0
    assert (tmp_path / "out.csv").read_bytes() != before

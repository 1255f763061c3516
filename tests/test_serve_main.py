"""python serve/main.py as a user starts it: by path, from elsewhere, on folders as they are found."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image
from serve_model import (
    CLASS_NAMES,
    Colour,
    broken_files,
    build_model,
    encode,
    probabilities_for,
    solid,
)

from serve.main import resampling_warning
from serve.metadata import ModelMetadata
from serve.preprocess import Preprocess

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "serve" / "main.py"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model.onnx", ("red", "green"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images in a folder."""
    root = tmp_path / "images"
    root.mkdir()
    for number, colour in enumerate((RED, GREEN, BLUE)):
        (root / f"{number}.png").write_bytes(encode(solid(colour), "PNG"))
    return root


def run(
    cwd: Path, *arguments: object, command: tuple[object, ...] = (sys.executable, SCRIPT)
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(part) for part in (*command, *arguments)],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- the zoo ---------------------------------------------------------------------------------------------


def photograph(colour: Colour, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(solid(colour, (64, 32)), "JPEG", exif=exif)


def animation(*colours: Colour) -> bytes:
    frames = [solid(colour) for colour in colours]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


GOOD: dict[str, tuple[bytes, Colour]] = {
    "red.png": (encode(solid(RED), "PNG"), RED),
    "Green.PNG": (encode(solid(GREEN), "PNG"), GREEN),
    "blue.jpg": (encode(solid(BLUE), "JPEG"), BLUE),
    "cmyk.jpg": (encode(solid(GREEN, (16, 16)).convert("CMYK"), "JPEG", quality=95), GREEN),
    "sixteen.png": (encode(Image.new("I;16", (9, 9), 0x2000), "PNG"), (0x20, 0x20, 0x20)),
    "animated.gif": (animation(BLUE, RED, RED), BLUE),
    "rotated.jpg": (photograph(RED, 6), RED),
    "line.png": (encode(solid(GREEN, (30000, 1)), "PNG"), GREEN),
    "with spaces .jpg": (encode(solid(RED), "JPEG"), RED),
    "고양이 한\n마리.jpg": (encode(solid(GREEN), "JPEG"), GREEN),
    os.fsdecode(b"caf\xe9.jpg"): (encode(solid(BLUE), "JPEG"), BLUE),
    "d.jpg/inside.png": (encode(solid(GREEN), "PNG"), GREEN),
}
BAD = broken_files()
BAD["._red.png"] = (b"\0\5\x16\7Mac OS X", "not an image file of a known format")
SPECIAL = {
    "x.jpg": "not a regular file",
    "self.jpg": "symbolic links",
    "loop": "linked folder, not followed",
}


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    root = tmp_path / "zoo"
    root.mkdir()
    (root / "d.jpg").mkdir()
    for name, (data, _) in (GOOD | BAD).items():
        (root / name).write_bytes(data)
    os.mkfifo(root / "x.jpg")
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "loop").symlink_to(".")
    (root / "notes.txt").write_text("not mine to read")
    return root


@pytest.mark.parametrize(("batch_size", "decode_threads"), [(1, 2), (7, 4), (32, 0)])
def test_a_hostile_folder_has_one_truthful_row_for_each_input(
    tmp_path: Path, model: Path, zoo: Path, batch_size: int, decode_threads: int
) -> None:
    started = time.monotonic()
    options = ("--batch-size", batch_size, "--decode-threads", decode_threads, "--output", "out.csv")
    done = run(tmp_path, "--model", model, "--images", "zoo", *options)
    assert time.monotonic() - started < 20
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr

    names = sorted([*GOOD, *BAD, *SPECIAL])
    rows = read_csv(tmp_path / "out.csv")
    written = [name.encode(errors="backslashreplace").decode() for name in names]
    assert [row["path"] for row in rows] == written
    for name, row in zip(names, rows, strict=True):
        probabilities = [row[f"probability_{c}"] for c in CLASS_NAMES]
        if name in GOOD:
            expected = probabilities_for(GOOD[name][1])
            assert row["error"] == "", name
            assert row["label"] == CLASS_NAMES[int(expected.argmax())], name
            np.testing.assert_allclose(np.array(probabilities, float), expected, atol=0.02, err_msg=name)
            assert row["probability"] == max(probabilities, key=float)
        else:
            assert (SPECIAL.get(name) or BAD[name][1]) in row["error"], name
            assert [row["label"], row["probability"], *probabilities] == [""] * 5, name
    assert (
        f"{len(names)} rows in out.csv: {len(GOOD)} scored, {len(BAD) + len(SPECIAL)} errors" in done.stdout
    )
    assert "ignored 1 files" in done.stderr


# -- what else a user meets ------------------------------------------------------------------------------


def test_one_image_can_be_given_instead_of_a_folder(tmp_path: Path, model: Path, images: Path) -> None:
    done = run(tmp_path, "--model", model, "--images", images / "1.png")
    assert done.returncode == 0
    rows = read_csv(tmp_path / "predictions.csv")
    assert [(row["path"], row["label"]) for row in rows] == [("1.png", "green")]


def test_kaggle_submission(tmp_path: Path, two_classes: Path, images: Path) -> None:
    (images / "3.jpg").write_bytes(b"")
    done = run(tmp_path, "--model", two_classes, "--images", images, "--format", "kaggle")
    assert done.returncode == 0
    rows = read_csv(tmp_path / "predictions.csv")
    assert [row["id"] for row in rows] == ["0", "1", "2", "3"]
    assert [float(row["label"]) > 0.4 for row in rows[:3]] == [False, True, True]
    assert rows[3]["label"] == ""
    assert "4 rows in predictions.csv: 3 scored, 1 errors" in done.stdout


def test_nothing_scored_is_exit_code_1_with_the_reasons_in_the_rows(tmp_path: Path, model: Path) -> None:
    (tmp_path / "images").mkdir()
    for name, (data, _) in broken_files().items():
        (tmp_path / "images" / name).write_bytes(data)
    done = run(tmp_path, "--model", model, "--images", "images")
    assert done.returncode == 1
    assert all(row["error"] for row in read_csv(tmp_path / "predictions.csv"))
    assert f"0 scored, {len(broken_files())} errors" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "missing.onnx"], "model 'missing.onnx' does not exist"),
        (["--model", "images/0.png"], "onnxruntime cannot load this model"),
        (["--images", "missing"], "--images 'missing' does not exist"),
        (["--images", "empty"], "no images in 'empty': 0 other files"),
        (["--images", "texts"], "no images in 'texts': 2 other files"),
        (["--output", "missing/out.csv"], "folder of --output 'missing/out.csv' does not exist"),
        (["--output", "empty"], "--output 'empty' is not a regular file"),
        (["--output", "fifo"], "--output 'fifo' is not a regular file"),
        (["--labels"], "--labels goes with --format kaggle"),
        (["--format", "kaggle"], "the model has 3 classes: add --labels"),
        (["--format", "kaggle", "--labels", "--images", "twins"], "have the same id '0'"),
        (["--batch-size", "0"], "batch_size 0"),
        (["--decode-threads", "-1"], "decode_threads -1"),
        (["--threads", "-1"], "threads -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unusable_arguments_are_exit_code_2_one_line_and_no_output(
    tmp_path: Path, model: Path, images: Path, arguments: list[str], reason: str
) -> None:
    for name in ("empty", "texts", "twins"):
        (tmp_path / name).mkdir()
    for name in ("texts/a.txt", "texts/b.onnx", "twins/0.png", "twins/0.jpg"):
        (tmp_path / name).write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.rglob("*"))
    done = run(tmp_path, "--model", model, "--images", images, *arguments)  # argparse: the last one counts
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("scoring ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_run_leaves_the_predictions_of_the_last_one(tmp_path: Path, model: Path) -> None:
    (tmp_path / "predictions.csv").write_text("yesterday's\n")
    assert run(tmp_path, "--model", model, "--images", "missing").returncode == 2
    assert (tmp_path / "predictions.csv").read_text() == "yesterday's\n"


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA driver")
def test_cuda_without_a_gpu_scores_nothing(tmp_path: Path, model: Path, images: Path) -> None:
    done = run(tmp_path, "--model", model, "--images", images, "--provider", "cuda")
    assert done.returncode == 2
    assert "error: provider 'cuda' is not to be had: no NVIDIA driver; it needs" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "predictions.csv").exists()


def test_the_provider_is_said_aloud(tmp_path: Path, model: Path, images: Path) -> None:
    done = run(tmp_path, "--model", model, "--images", images)
    assert "(red, green, blue) on the cpu provider at fp32, 4 of 4 nodes (auto: cuda: " in done.stderr


def test_a_clone_started_by_path_runs_its_own_code_whatever_is_installed(tmp_path: Path) -> None:
    clone = tmp_path / "clone" / "serve"
    shutil.copytree(REPOSITORY / "serve", clone)
    with (clone / "batch.py").open("a") as file:
        file.write("\nprint('the clone is', __file__)\n")
    done = run(tmp_path, "--help", command=(sys.executable, clone / "main.py"))
    assert done.stdout.startswith(f"the clone is {clone / 'batch.py'}\n"), done.stderr


# -- serving stands alone --------------------------------------------------------------------------------

TRAINING_ONLY = ("torch", "torchvision", "mlflow", "pandas", "onnx", "jsonargparse")


def test_serving_imports_nothing_of_training(tmp_path: Path, model: Path, images: Path) -> None:
    unwanted = (*TRAINING_ONLY, "train", "export", "onnxruntime_ep_openvino")
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['main.py', '--model', {str(model)!r}, '--images', {str(images)!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as done:\n"
        "    assert done.code == 0\n"
        f"print('imported:', [name for name in {unwanted!r} if name in sys.modules])\n"
    )
    done = run(tmp_path, command=(sys.executable, "-c", program))
    assert "3 scored" in done.stdout, done.stderr
    assert "imported: []" in done.stdout


def test_the_base_install_scores_on_a_machine_without_torch(
    tmp_path: Path, model: Path, images: Path
) -> None:
    source, python = tmp_path / "source", tmp_path / "venv" / "bin" / "python"
    for package in ("train", "export", "serve"):
        shutil.copytree(
            REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(REPOSITORY / "pyproject.toml", source)
    (source / "README.md").touch()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", source], check=True, timeout=300)
    shutil.rmtree(source)

    program = f"import importlib.util as u; print([n for n in {TRAINING_ONLY!r} if u.find_spec(n)])"
    assert run(tmp_path, command=(python, "-c", program)).stdout == "[]\n"
    done = run(tmp_path, "--model", model, "--images", images, command=(python, "-m", "serve.main"))
    assert done.returncode == 0, done.stderr
    assert [row["label"] for row in read_csv(tmp_path / "predictions.csv")] == ["red", "green", "blue"]


def test_help_says_what_is_needed(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert "--model" in done.stdout
    assert "onnxruntime, numpy and Pillow only" in done.stdout


def test_another_pillow_than_the_verified_one_is_said() -> None:
    """Its resampling changed between major versions, and resized pixels with it."""
    this = ModelMetadata(CLASS_NAMES, Preprocess(), versions={"pillow": PIL.__version__})
    other = ModelMetadata(CLASS_NAMES, Preprocess(), versions={"pillow": "3.1.4"})
    assert resampling_warning(this) == ""
    assert "was verified with Pillow 3.1.4" in resampling_warning(other)

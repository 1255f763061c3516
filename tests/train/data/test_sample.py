"""The drawn sample: reproducible, whole or absent, and told apart by nothing but shape."""

import csv
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from train.data import sample
from train.data.sample import draw_face, make_sample

SCRIPT = Path(sample.__file__).resolve()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "sample"
    make_sample(root, train_per_class=200, num_test=9)
    return root


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def train_files(root: Path) -> list[Path]:
    return [root / "train" / f"{label}.{i}.jpg" for label in ("cat", "dog") for i in range(200)]


def linear_accuracy(features: list[np.ndarray]) -> float:
    """Five-fold accuracy of a linear classifier on features of `train_files`."""
    classes = np.repeat([0, 1], 200)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    return float(cross_val_score(model, np.stack(features), classes, cv=5).mean())


def test_the_layout_is_that_of_dogs_vs_cats(root: Path) -> None:
    with (root / "test_labels.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    test = [f"test/{i}.jpg" for i in range(1, 10)]
    train = [path.relative_to(root).as_posix() for path in train_files(root)]
    assert sorted(contents(root)) == sorted([*test, *train, "test_labels.csv"])
    assert [row["path"] for row in rows] == test
    assert sorted(row["label"] for row in rows) == ["cat"] * 5 + ["dog"] * 4


def test_images_are_rgb_of_many_sizes(root: Path) -> None:
    images = [Image.open(path) for path in train_files(root)]
    assert {image.mode for image in images} == {"RGB"}
    assert all(120 <= side <= 260 for image in images for side in image.size)
    assert len({image.size for image in images}) > 350


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        make_sample(tmp_path / name, train_per_class=3, num_test=4, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_an_image_does_not_depend_on_how_many_are_made(root: Path, tmp_path: Path) -> None:
    make_sample(tmp_path / "few", train_per_class=2, num_test=0)
    few = {path: image for path, image in contents(tmp_path / "few").items() if "train/" in path}
    assert len(few) == 4
    assert few.items() <= contents(root).items()


def test_no_two_images_are_equal(root: Path) -> None:
    assert len(set(contents(root).values())) == 2 * 200 + 9 + 1


def test_a_cat_and_a_dog_of_the_same_seed_differ() -> None:
    for seed in range(5):
        cat, dog = (draw_face(label, np.random.default_rng(seed)) for label in ("cat", "dog"))
        assert cat.size == dog.size
        assert cat.tobytes() != dog.tobytes()


# A guess is right half the time, give or take 0.025 with 400 images.


def test_a_linear_classifier_of_thumbnails_cannot_tell_the_classes(root: Path) -> None:
    thumbnails = [Image.open(path).convert("L").resize((16, 16)) for path in train_files(root)]
    assert linear_accuracy([np.asarray(image).ravel() for image in thumbnails]) < 0.65


def test_colour_and_brightness_do_not_give_the_class_away(root: Path) -> None:
    images = [np.asarray(Image.open(path)) for path in train_files(root)]
    moments = [np.concatenate([x.mean((0, 1)), x.std((0, 1))]) for x in images]
    assert linear_accuracy(moments) < 0.6
    histograms = [
        np.concatenate([np.histogram(x[..., c], 8, (0, 256))[0] / x[..., c].size for c in range(3)])
        for x in images
    ]
    assert linear_accuracy(histograms) < 0.62


def test_image_size_and_file_size_do_not_give_the_class_away(root: Path) -> None:
    features = []
    for path in train_files(root):
        width, height = Image.open(path).size
        size = path.stat().st_size
        features.append(np.array([width, height, width / height, size, size / (width * height)]))
    assert linear_accuracy(features) < 0.6


def test_a_second_call_does_nothing(tmp_path: Path) -> None:
    make_sample(tmp_path / "sample", train_per_class=1, num_test=1)
    before = contents(tmp_path / "sample")
    make_sample(tmp_path / "sample", train_per_class=2, num_test=2, seed=1)
    assert contents(tmp_path / "sample") == before
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]


def test_an_interrupted_make_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faces() -> Iterator[Image.Image]:
        yield draw_face("cat", np.random.default_rng(0))
        raise KeyboardInterrupt

    drawn = faces()
    monkeypatch.setattr(sample, "draw_face", lambda label, rng: next(drawn))
    with pytest.raises(KeyboardInterrupt):
        make_sample(tmp_path / "sample", train_per_class=2, num_test=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_make_leaves_no_sample_and_the_next_call_makes_it(tmp_path: Path) -> None:
    root = tmp_path / "sample"
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--output", str(root)])
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".sample-*/drawn/train/*.jpg")):
        assert time.monotonic() < deadline, "nothing was drawn"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not root.exists()
    make_sample(root, train_per_class=1, num_test=1)
    assert len(contents(root)) == 4


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        make_sample(tmp_path, train_per_class=1, num_test=1)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_the_script_runs_by_path_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--output", "new/sample", "--train-per-class", "1"]
    subprocess.run([*command, "--num-test", "1"], cwd=tmp_path, check=True)
    make_sample(tmp_path / "imported", train_per_class=1, num_test=1)
    assert contents(tmp_path / "new" / "sample") == contents(tmp_path / "imported")


def test_the_script_needs_only_numpy_and_pillow() -> None:
    code = (
        "import sys; before = set(sys.modules); import train.data.sample;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=SCRIPT.parents[2], check=True, capture_output=True, text=True)
    others = set(done.stdout.split()) - sys.stdlib_module_names - {"numpy", "PIL", "train", "serve"}
    assert not others

"""How near the accuracy that scoring estimates without labels is to the true one, when images change.

python benchmarks/estimated_accuracy.py --data FOLDER_OF_cat.N.jpg

Three models are trained by the real commands: an EfficientNet-Lite0 with a tuned head and a simple_cnn on
photographs of two classes, and a simple_cnn on scikit-learn's ten digits. Images that none of them has seen
are changed in ten ways and scored; the table has the true accuracy beside the estimate. Ten minutes on two
busy cores.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.digits import write_digits  # noqa: E402
from train.data.sample import make_sample  # noqa: E402

Change = Callable[[Image.Image], Image.Image]
CLASSES = ("cat", "dog")


@dataclass(frozen=True)
class Model:
    name: str
    settings: tuple[str, ...]
    has_photographs: bool = True


MODELS = (
    Model(
        "tf_efficientnet_lite0, head tuned, 128 px",
        (
            "--model=tf_efficientnet_lite0",
            "--weights=package",
            "--freeze=-1",
            "--image-size=128",
            "--epochs=2",
        ),
    ),
    Model("simple_cnn, from scratch, 64 px", ("--model=simple_cnn", "--image-size=64", "--epochs=12")),
    Model(
        "simple_cnn, ten digits, 32 px",
        ("--model=simple_cnn", "--image-size=32", "--epochs=12", "--flip=0"),
        False,
    ),
)


def smaller(side: int) -> Change:
    return lambda image: image.resize((side, side), Image.Resampling.BILINEAR)


def changes(side: int, blur: float) -> dict[str, Change]:
    """Return what is done to images; `side` is that of small ones, `blur` the radius."""
    return {
        "as they are": lambda image: image,
        "grey": lambda image: image.convert("L").convert("RGB"),
        f"{side} x {side} pixels": smaller(side),
        f"{side} x {side} pixels, grey": lambda image: smaller(side)(image).convert("L").convert("RGB"),
        f"blur, radius {blur:g}": lambda image: image.filter(ImageFilter.GaussianBlur(blur)),
        "quarter turn": lambda image: image.transpose(Image.Transpose.ROTATE_90),
        "negative": ImageOps.invert,
        "darker, a quarter": lambda image: image.point(lambda value: value // 4),
    }


def link_photographs(source: Path, train: Path, test: Path, num_train: int, num_test: int) -> None:
    random = np.random.default_rng(0)
    for name in CLASSES:
        files = sorted(source.glob(f"{name}.*.jpg"))
        assert len(files) >= (num_train + num_test) // 2, f"too few {name}.N.jpg in {source}"
        chosen = random.permutation(len(files))[: (num_train + num_test) // 2]
        for i, number in enumerate(chosen):
            folder = train if i < num_train // 2 else test
            folder.mkdir(parents=True, exist_ok=True)
            (folder / files[number].name).symlink_to(files[number].resolve())


def split_digits(folder: Path, train: Path, test: Path) -> None:
    """Every third digit is a test image, named as photographs are."""
    write_digits(folder)
    test.mkdir()
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        target = train / path.parent.name / path.name if i % 3 else test / f"{path.parent.name}.{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def sets(test: Path, other: Path | None, work: Path, side: int, blur: float) -> Iterator[tuple[str, Path]]:
    """Yield names and folders of changed test images, of one class alone, and of another data set."""
    files = sorted(test.iterdir())
    for name, change in changes(side, blur).items():
        folder = work / name
        folder.mkdir()
        for path in files:
            with Image.open(path) as image:
                change(image.convert("RGB")).save(folder / f"{path.stem}.png", compress_level=1)
        yield name, folder
    for name, quality, kept in (("JPEG of quality 10", 10, files), ("one class only", 95, files)):
        folder = work / name
        folder.mkdir()
        for path in kept:
            if quality == 95 and label_of(path.name) != label_of(files[0].name):
                continue
            with Image.open(path) as image:
                image.convert("RGB").save(folder / f"{path.stem}.jpg", quality=quality)
        yield name, folder
    if other:
        yield "another data set (drawn)", other


def label_of(name: str) -> str:
    return Path(name).name.split(".")[0]


def run(work: Path, *command: object) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def measure(model: Path, images: Path, work: Path) -> str:
    """Return a row of the table."""
    out, summary = work / "p.csv", work / "s.json"
    arguments = ("--model", model, "--images", images, "--output", out, "--summary", summary, "--overwrite")
    run(work, ROOT / "serve" / "main.py", *arguments)
    with out.open(newline="", encoding="utf-8") as file:
        right = [row["label"] == label_of(row["path"]) for row in csv.DictReader(file)]
    found = json.loads(summary.read_text())
    estimate, truth = found["estimated_accuracy"], sum(right) / len(right)
    if estimate is None:
        return f"{len(right)} | {truth:.3f} | none | | | "
    inside = "yes" if estimate["low"] <= truth <= estimate["high"] else "**no**"
    differences = "; ".join(found["differences"]) or "-"
    return (
        f"{len(right)} | {truth:.3f} | {estimate['accuracy']:.3f} ({estimate['low']:.3f} to "
        f"{estimate['high']:.3f}) | {inside} | {'yes' if estimate['differs'] else 'no'} | {differences}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of cat.N.jpg and dog.N.jpg")
    parser.add_argument("--train-images", type=int, default=3000)
    parser.add_argument("--test-images", type=int, default=600)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        link_photographs(args.data, work / "pets", work / "unseen", args.train_images, args.test_images)
        split_digits(work / "all", work / "digits", work / "unseen_digits")
        make_sample(work / "sample", train_per_class=150, num_test=1)
        for number, model in enumerate(MODELS):
            data = work / ("pets" if model.has_photographs else "digits")
            common = ("--val-fraction=0.3", "--track=false", "--batch-size=64", f"--name=m{number}")
            run(work, ROOT / "train" / "main.py", f"--data={data}", *model.settings, *common)
            run(work, ROOT / "export" / "main.py", "--run", work / "runs" / f"m{number}")
            exported = work / "runs" / f"m{number}" / "export" / "model.onnx"
            record = json.loads(exported.with_name("verification.json").read_text())
            threshold = record["threshold"]
            print(
                f"\n{model.name}: accuracy {record['accuracy_served']:.3f} on {record['num_images']} "
                f"validation images, threshold {threshold['probability']:.3f}\n"
            )
            print("| images | n | true | estimated (95 %) | inside | warned | differences |", flush=True)
            print("|---|---|---|---|---|---|---|")
            changed = work / f"changed{number}"
            changed.mkdir()
            test = work / ("unseen" if model.has_photographs else "unseen_digits")
            other = work / "sample" / "train" if model.has_photographs else None
            side, blur = (48, 6.0) if model.has_photographs else (8, 3.0)
            for name, images in sets(test, other, changed, side, blur):
                print(f"| {name} | {measure(exported, images, work)} |", flush=True)


if __name__ == "__main__":
    main()

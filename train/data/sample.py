"""Draw a small cats-vs-dogs data set, so that a machine without a download can train something.

    python train/data/sample.py --output data/sample

makes train/cat.0.jpg ... dog.599.jpg, test/1.jpg ... 100.jpg and test_labels.csv, as in Kaggle's
dogs-vs-cats. Only shape tells the classes apart: upright ears and whiskers, or hanging ears and a muzzle.
Fur, pose, background, light, image size and JPEG quality are alike. An accuracy on these drawings shows
that the training code works, and nothing about real cats and dogs.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFilter

if not __package__:  # started by path: the repository root, not train/data/, belongs on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from serve.contract.command_line import CommandLine, Number

LABELS = ("cat", "dog")
TRAIN, TEST = 0, 1  # part of each image's seed
SUPERSAMPLE = 2  # ImageDraw has no antialiasing: draw larger, then reduce

Floats = NDArray[np.float64]  # points are (n, 2), x to the right and y down; colours (3,), 0-255
# black, chocolate, brown, ginger, cream, white, grey, blue-grey
FURS = ["#302c2c", "#563c2c", "#865c3a", "#d48842", "#e4caa0", "#eeeae4", "#8e8c8c", "#626a78"]
IRISES = ["#78a046", "#c8a032", "#6ea0c8", "#82542c"]
NOSES = ["#2c2426", "#5c3e38", "#ce8480"]
PINK, WHITE, BLACK = np.array([222.0, 120.0, 128.0]), np.full(3, 245.0), np.full(3, 22.0)


class Pen:
    """Draws in a face's own coordinates: the origin is between the eyes, its radius about 1."""

    def __init__(self, image: Image.Image, rng: np.random.Generator, pose: Floats, at: Floats):
        self.image, self.rng, self.draw = image, rng, ImageDraw.Draw(image)
        self.pose, self.at = pose, at  # (2, 2) and (2,): point p lands on pixel pose @ p + at
        self.unit = float(np.sqrt(abs(np.linalg.det(pose))))  # pixels per face radius

    def moved(self, x: float) -> Pen:
        return Pen(self.image, self.rng, self.pose, self.at + self.pose @ [x, 0])

    def halves(self) -> tuple[Pen, Pen]:
        return self, Pen(self.image, self.rng, self.pose * [-1, 1], self.at)  # and mirrored

    def pixels(self, points: ArrayLike) -> list[tuple[float, float]]:
        return [(x, y) for x, y in (np.asarray(points) @ self.pose.T + self.at).tolist()]

    def fill(self, points: ArrayLike, colour: Floats) -> None:
        self.draw.polygon(self.pixels(points), fill=rgb(colour))

    def line(self, points: ArrayLike, colour: Floats, width: float) -> None:
        width_px = max(1, round(width * self.unit))
        self.draw.line(self.pixels(points), fill=rgb(colour), width=width_px, joint="curve")

    def fur(self, outline: Floats, colour: Floats, hairs: int = 90) -> None:
        """Fill an outline, then stroke hairs from its middle outwards, a little past its edge."""
        self.fill(outline, colour)
        middle = outline.mean(axis=0)
        out = outline[self.rng.integers(len(outline), size=hairs)] - middle
        roots = middle + out * np.sqrt(self.rng.uniform(0.1, 0.9, (hairs, 1)))
        tips = roots + 0.12 * out / np.linalg.norm(out, axis=1, keepdims=True)
        shades = [rgb(colour * shade) for shade in (0.82, 0.9, 1.08, 1.16)]
        width = max(1, round(0.018 * self.unit))
        for i, hair in enumerate(zip(self.pixels(roots), self.pixels(tips), strict=True)):
            self.draw.line(hair, fill=shades[i % 4], width=width)


def rgb(colour: Floats) -> tuple[int, int, int]:
    r, g, b = (int(c) for c in np.clip(colour, 0, 255))
    return r, g, b


def pick(rng: np.random.Generator, palette: list[str]) -> Floats:
    """Take a colour of a palette, a little lighter or darker and a little off."""
    colour = np.array(ImageColor.getrgb(rng.choice(palette)))
    return np.asarray(colour * rng.uniform(0.85, 1.12) + rng.normal(0, 6, 3))


def ellipse(x: float, y: float, rx: float, ry: float) -> Floats:
    t = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], axis=1)


def smooth(corners: list[tuple[float, float]], rounds: int = 3) -> Floats:
    """Round a closed polygon by cutting its corners (Chaikin)."""
    points = np.array(corners)
    for _ in range(rounds):
        after = np.roll(points, -1, axis=0)
        cut = [0.75 * points + 0.25 * after, 0.25 * points + 0.75 * after]
        points = np.stack(cut, axis=1).reshape(-1, 2)
    return points


def rotation(angle: float) -> Floats:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def draw_face(label: str, rng: np.random.Generator) -> Image.Image:
    """Draw a "cat" or "dog" before a cluttered background: RGB, sides of 120 to 260 pixels.

    Equal states of `rng` give equal images.
    """
    size = rng.integers(120, 261, size=2)
    image = draw_background(rng, size * SUPERSAMPLE)
    scale = min(image.size) * rng.uniform(0.2, 0.36)
    tilt = rotation(np.radians(rng.uniform(-35, 35)))
    pose = scale * tilt @ np.diag(rng.uniform(0.87, 1.15, 2))
    pen = Pen(image, rng, pose, rng.uniform(0.28, 0.72, 2) * image.size)  # may be cropped
    coat, marking = pick(rng, FURS), pick(rng, FURS)
    draw_body(pen, coat)
    (draw_cat if label == "cat" else draw_dog)(pen, coat, marking)
    draw_clutter(image, rng, count=int(rng.integers(3)), largest=0.16)  # may hide parts of it
    return photograph(image.reduce(SUPERSAMPLE), rng)


def draw_background(rng: np.random.Generator, size: NDArray[np.int64]) -> Image.Image:
    few = rng.uniform(60, 205) + rng.normal(0, 24, 3)  # one colour, shaded over a 3x3 grid
    few = few + rng.normal(0, 24, (3, 3, 1)) + rng.normal(0, 10, (3, 3, 3))
    grid = Image.fromarray(np.clip(few, 0, 255).astype(np.uint8))
    image = grid.resize((int(size[0]), int(size[1])), Image.Resampling.BICUBIC)
    draw_clutter(image, rng, count=int(rng.integers(6, 16)), largest=0.35)
    return image.filter(ImageFilter.BoxBlur(float(rng.uniform(0, 5))))


def draw_clutter(image: Image.Image, rng: np.random.Generator, count: int, largest: float) -> None:
    """Strew shapes, alike in both classes; some resemble either's ears, muzzle and eyes."""
    for _ in range(count):
        pose = min(image.size) * rng.uniform(0.05, largest) * rotation(rng.uniform(0, 2 * np.pi))
        pen = Pen(image, rng, pose, rng.uniform(0, 1, 2) * image.size)
        colour = rng.uniform(40, 225) + rng.normal(0, 36, 3)
        colour = pick(rng, FURS) if rng.random() < 0.5 else colour
        kind = rng.integers(5)
        if kind == 0:
            pen.fur(ellipse(0, 0, 1, rng.uniform(0.3, 1)), colour)
        elif kind == 1:
            pen.fur(np.array([(-0.8, 0.7), (0, -1.2), (0.8, 0.7)]), colour)
        elif kind == 2:
            pen.fill([(-1, -0.6), (1, -0.6), (1, 0.6), (-1, 0.6)], colour)
        elif kind == 3:
            for x in np.linspace(-1, 1, 6):
                pen.line([(x, -1.5), (x, 1.5)], colour, 0.14)
        else:
            pen.fill(ellipse(0, 0, 0.5, 0.5), colour)
            pen.fill(ellipse(0, 0, 0.25, 0.25), BLACK)


def draw_body(pen: Pen, coat: Floats) -> None:
    x, wide = pen.rng.uniform(-0.3, 0.3), pen.rng.uniform(0.8, 1.25)
    pen.fur(ellipse(x, 2.6, wide, 2.1), 0.88 * coat, hairs=160)
    if pen.rng.random() < 0.3:
        pen.line([(-0.7, 1.0), (0, 1.2), (0.7, 1.0)], pen.rng.uniform(30, 230, 3), 0.16)  # collar


def draw_cat(pen: Pen, coat: Floats, marking: Floats) -> None:
    rng = pen.rng
    x, y = rng.uniform(0.6, 1.0), rng.uniform(-1.6, -1.2)  # tip of the ear
    ear = smooth([(0.98, -0.1), (x, y), (x - 0.05, y), (0.1, -0.75), (0.4, 0)], 2)
    for half in pen.halves():
        half.fur(ear, 0.93 * coat)
        half.fill(0.6 * ear + [0.26, -0.27], 0.5 * coat + 0.5 * PINK)
    pen.fur(ellipse(0, 0.08, rng.uniform(0.95, 1.1), rng.uniform(0.8, 0.92)), coat, hairs=220)
    draw_forehead(pen, marking)
    front = pen.moved(rng.uniform(-0.12, 0.12))  # turns the head: the features slide over it
    draw_eyes(front, rng.uniform(0.38, 0.48), rng.uniform(0.17, 0.23), pupil=(0.25, 0.85))
    for half in front.halves():
        half.fur(ellipse(0.2, 0.5, 0.25, 0.2), 0.5 * marking + 0.5 * WHITE, hairs=40)
        half.line([(0, 0.42), (0.02, 0.54), (0.12, 0.62), (0.24, 0.58)], BLACK, 0.03)
        for y in (0.3, 0.5, 0.7):  # whiskers
            half.line([(0.3, 0.47), (0.8, y), (rng.uniform(1.1, 1.4), 1.5 * y - 0.2)], WHITE, 0.02)
    front.fill(smooth([(-0.15, 0.26), (0.15, 0.26), (0, 0.44)], 2), pick(rng, NOSES))


def draw_dog(pen: Pen, coat: Floats, marking: Floats) -> None:
    rng = pen.rng
    pen.fur(ellipse(0, 0, rng.uniform(0.78, 0.95), rng.uniform(0.88, 1.0)), coat, hairs=220)
    draw_forehead(pen, marking)
    front = pen.moved(rng.uniform(-0.12, 0.12))
    draw_eyes(front, rng.uniform(0.32, 0.4), rng.uniform(0.12, 0.17), pupil=(0.6, 0.6))
    chin = rng.uniform(0.95, 1.2)
    if rng.random() < 0.5:
        front.fill(ellipse(0, chin, 0.15, 0.33), PINK + rng.normal(0, 12, 3))  # tongue
    muzzle = [(-0.22, -0.1), (0.22, -0.1), (0.52, 0.6), (0.4, chin), (-0.4, chin), (-0.52, 0.6)]
    front.fur(smooth(muzzle), 0.5 * marking + 0.5 * WHITE)
    front.fill(ellipse(0, 0.42, rng.uniform(0.2, 0.26), 0.17), pick(rng, NOSES))
    x, y = rng.uniform(1.05, 1.35), rng.uniform(0.4, 0.95)  # tip of the ear
    ear = smooth([(0.35, -0.95), (0.95, -0.8), (x, y), (0.85, y + 0.1), (0.7, -0.2)])
    for half in front.halves():
        half.line([(0, 0.55), (0.02, 0.74), (0.16, 0.84), (0.32, 0.76)], BLACK, 0.035)
    for half in pen.halves():
        half.fur(ear, 0.6 * coat + 0.25 * marking)


def draw_forehead(pen: Pen, marking: Floats) -> None:
    """Draw stripes, a blaze, an eye patch or nothing, whatever the animal."""
    kind = pen.rng.integers(4)
    if kind == 0:
        for x in (-0.3, -0.1, 0.1, 0.3):
            pen.line([(x, -0.72), (0.8 * x, -0.4)], marking, 0.07)
    elif kind == 1:
        pen.fur(ellipse(0, -0.3, 0.15, 0.5), marking, hairs=40)
    elif kind == 2:
        pen.fur(ellipse(pen.rng.choice([-0.4, 0.4]), -0.12, 0.33, 0.38), marking, hairs=40)


def draw_eyes(pen: Pen, apart: float, size: float, pupil: tuple[float, float]) -> None:
    iris = pick(pen.rng, IRISES)
    for x in (-apart, apart):
        pen.fill(ellipse(x, -0.1, 1.15 * size, 1.1 * size), BLACK)
        pen.fill(ellipse(x, -0.1, size, 0.95 * size), iris)
        pen.fill(ellipse(x, -0.1, pupil[0] * size, pupil[1] * size), BLACK)
        pen.fill(ellipse(x + 0.05, -0.16, 0.2 * size, 0.2 * size), WHITE)


def photograph(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Defocus a drawing, light it unevenly and add sensor noise."""
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.2))))
    corners = Image.fromarray(rng.uniform(0.6, 1.2, (2, 2)).astype(np.float32))
    light = np.asarray(corners.resize(image.size, Image.Resampling.BICUBIC))[..., None]
    noise = rng.standard_normal((image.height, image.width, 3), np.float32) * rng.uniform(0, 12)
    return Image.fromarray(np.clip(np.asarray(image) * light + noise, 0, 255).astype(np.uint8))


def make_sample(root: Path, *, train_per_class: int = 600, num_test: int = 100, seed: int = 0) -> None:
    """Make the data set in `root`, or do nothing if `root` already holds one, whatever its size.

    `root/train` gets `train_per_class` images of each class, `root/test` `num_test` of both. Equal
    arguments give equal files (with equal numpy and Pillow); an image does not depend on the number of
    others. The set is drawn beside `root` and renamed when it is whole, so an interrupted run leaves no
    `root`. Raises FileExistsError if `root` holds others.
    """
    if (root / "test_labels.csv").is_file():
        return
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty and is no finished sample; choose another")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        drawn = Path(scratch) / "drawn"  # unlike scratch itself, readable by other users
        draw_sample(drawn, train_per_class, num_test, seed)
        drawn.rename(root)


def draw_sample(root: Path, train_per_class: int, num_test: int, seed: int) -> None:
    (root / "train").mkdir(parents=True)
    (root / "test").mkdir()
    for c, label in enumerate(LABELS):
        for i in range(train_per_class):
            save_image(root / "train" / f"{label}.{i}.jpg", label, [seed, TRAIN, c, i])
    classes = np.random.default_rng([seed, TEST]).permutation(np.arange(num_test) % 2).tolist()
    with (root / "test_labels.csv").open("w", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(["path", "label"])
        for i, c in enumerate(classes, start=1):
            save_image(root / "test" / f"{i}.jpg", LABELS[c], [seed, TEST, c, i])
            table.writerow([f"test/{i}.jpg", LABELS[c]])


def save_image(path: Path, label: str, key: list[int]) -> None:
    rng = np.random.default_rng(key)
    image = draw_face(label, rng)
    image.save(path, quality=int(rng.integers(60, 96)))


def main() -> None:
    parser = CommandLine("train/data/sample.py", "Draw a small cats-vs-dogs data set.")
    add = parser.add_argument
    add("--output", type=Path, default=Path("data/sample"), help="folder of the data set")
    add("--train-per-class", type=Number(int, 1), default=600, help="training images of each class")
    add("--num-test", type=Number(int, 1), default=100, help="test images")
    add("--seed", type=Number(int), default=0, help="the images are a function of it")
    args = parser.parse_args()
    make_sample(args.output, train_per_class=args.train_per_class, num_test=args.num_test, seed=args.seed)
    print(f"sample set in {args.output}: drawn cats and dogs, {2 * args.train_per_class} training images")


if __name__ == "__main__":
    main()

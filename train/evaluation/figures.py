"""Figures of runs, and sheets of images with captions."""

import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from serve.contract.images import load_accepted
from serve.contract.preprocess import Preprocess
from train.data.index import ImageSet
from train.evaluation.metrics import MOST_CLASSES
from train.evaluation.predictions import Predictions
from train.models.classifier import ImageClassifier

COLUMNS = 6  # of images
MOST_IMAGES = 3 * COLUMNS
WHOLE = Preprocess(mode="pad", size=192)
WIDEST = 26  # characters of a caption; East Asian ones count twice
# Okabe and Ito's colours, which the colour-blind can distinguish; without yellow, too pale for a line
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")  # each set of colours again, dashed
# for class names that matplotlib's own font cannot draw
EAST_ASIAN_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "NanumGothic"),
    *("Droid Sans Fallback", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"),
)

mpl.use("Agg")  # no display in a training job
mpl.rcParams["text.parse_math"] = False  # a name with two $ is no formula
mpl.rcParams["font.family"] = [
    "sans-serif",
    *(font for font in EAST_ASIAN_FONTS if font in fontManager.get_font_names()),
]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file. A character that no installed font has is drawn as a box, without a warning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(path, dpi=110, bbox_inches="tight")


def drawable(text: str) -> str:
    """Return text that matplotlib can draw: composed, as fonts have it, and with odd bytes escaped."""
    return unicodedata.normalize("NFC", text.encode("utf-8", "backslashreplace").decode())


def save_figures(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    predictions: Predictions,
    images: ImageSet,
    preprocess: Preprocess,
) -> list[Path]:
    """Draw a finished run; `rows` are those of metrics.jsonl, `predictions` those of `images`."""
    figures = {"curves": training_curves(rows)}
    if len(images.class_names) <= MOST_CLASSES:
        figures["confusion_matrix"] = _confusion_matrix(predictions)
    figures["worst_mistakes"] = _worst_mistakes(predictions, images, preprocess)
    paths = {folder / f"{name}.png": figure for name, figure in figures.items()}
    for path, figure in paths.items():
        save_figure(figure, path)
    return list(paths)


@torch.inference_mode()
def save_subject_crops(
    path: Path, model: ImageClassifier, images: ImageSet, preprocess: Preprocess
) -> None:
    """Draw validation images, evenly spaced, each with the square that the network sees."""
    chosen = np.linspace(0, len(images) - 1, min(len(images), MOST_IMAGES)).round().astype(int)
    pixels = np.stack([_read_pixels(images.root / images.paths[i], preprocess) for i in chosen])
    boxes = model.eval().locate(torch.from_numpy(pixels).to(model.mean.device)).cpu().numpy()
    figure, cells = _grid(len(chosen))
    for axes, i, image, box in zip(cells, chosen, pixels, boxes, strict=False):
        axes.imshow(image)
        left, upper, right, lower = box * preprocess.size - 0.5
        width, height = right - left, lower - upper
        axes.add_patch(
            Rectangle((left, upper), width, height, fill=False, color="yellow", linewidth=2, clip_on=False)
        )
        axes.set_title(caption(images.paths[i].rpartition("/")[2]), fontsize=7)
    save_figure(figure, path)


def comparison_curves(runs: Mapping[str, Sequence[dict[str, Any]]], best_epochs: Sequence[int]) -> Figure:
    """Draw curves of several runs (name -> rows of metrics.jsonl) with a dot at each best epoch."""
    columns = max(1, min(4, len(runs), 140 // max(map(len, runs))))  # of the legend
    figure = Figure(figsize=(13, 4.2 + 0.25 * (len(runs) // columns)), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, quantity in zip(panels, ("train/loss", "val/accuracy", "val/log_loss"), strict=True):
        for i, ((name, rows), best) in enumerate(zip(runs.items(), best_epochs, strict=True)):
            epochs, values = _points(rows, quantity)
            axes.plot(
                epochs,
                values,
                color=COLORS[i % len(COLORS)],
                linestyle=DASHES[i // len(COLORS) % len(DASHES)],
                marker="o",
                markevery=[epochs.index(best)],
                label=drawable(name),
            )
        axes.set(title=quantity)
        count_along(axes, "epoch")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    return figure


def training_curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw loss and accuracy of training and validation; `rows` are those of metrics.jsonl."""
    figure = Figure(figsize=(10, 3.6))
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for side, color in (("train", "tab:gray"), ("val", "tab:blue")):
            axes.plot(*_points(rows, f"{side}/{quantity}"), color=color, marker=".", label=side)
        axes.set(ylabel=quantity, title=quantity)
        count_along(axes, "epoch")
        axes.legend()
    return figure


def _points(rows: Sequence[dict[str, Any]], quantity: str) -> tuple[list[int], list[float]]:
    measured = [row for row in rows if quantity in row]  # not every epoch ends with a validation
    return [row["epoch"] for row in measured], [row[quantity] for row in measured]


def count_along(axes: Axes, unit: str) -> None:
    """Label the horizontal axis with whole numbers, as of epochs or images."""
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _confusion_matrix(predictions: Predictions) -> Figure:
    from sklearn.metrics import ConfusionMatrixDisplay  # a second and a half, which a comparison can spare

    names = [drawable(name) for name in predictions.class_names]
    figure = Figure(figsize=(max(3.5, 0.45 * len(names)),) * 2)
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(predictions.confusion, display_labels=names)
    display.plot(ax=axes, cmap="Blues", xticks_rotation=45, colorbar=False)
    axes.set(xlabel="predicted", ylabel="true", title="validation images")
    return figure


def _worst_mistakes(predictions: Predictions, images: ImageSet, preprocess: Preprocess) -> Figure:
    """Draw the images with the highest loss, as the network sees them."""
    own = predictions.probabilities[np.arange(len(images)), predictions.labels]
    pictures = []
    for i in np.argsort(own)[:MOST_IMAGES].tolist():
        true, guess = (images.class_names[c[i]] for c in (predictions.labels, predictions.predicted))
        verdict = "" if true == guess else f"{true}, not\n"
        text = f"{images.paths[i].rpartition('/')[2]}\n{verdict}{predictions.confidence[i]:.2f} {guess}"
        pictures.append(Picture(images.root / images.paths[i], text, true != guess))
    mistakes = int((~predictions.correct).sum())
    title = f"highest loss of {len(images)} validation images ({mistakes} mistakes)"
    return contact_sheet(title, pictures, preprocess)


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with at least `count` cells for images."""
    rows = max(1, -(-count // COLUMNS))
    figure = Figure(figsize=(2 * COLUMNS, 2.35 * rows + 0.5), layout="constrained")
    cells = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes in cells:
        axes.axis("off")
    return figure, cells


def _read_pixels(path: Path, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Return an image's pixels; grey for an unreadable file, which must not end a finished run."""
    try:
        return preprocess(load_accepted(path, preprocess.decode))
    except (OSError, ValueError) as error:
        print(f"warning: {path} cannot be shown: {error}", flush=True)
        return np.full((preprocess.size, preprocess.size, 3), 128, np.uint8)


def caption(text: str) -> str:
    """Return text that can be drawn, with lines no wider than a picture."""
    lines = []
    for line in drawable(text).split("\n"):
        widths = np.cumsum([1 + (unicodedata.east_asian_width(character) in "WF") for character in line])
        whole = not line or widths[-1] <= WIDEST
        lines.append(line if whole else f"{line[: np.searchsorted(widths, WIDEST - 1, 'right')]}…")
    return "\n".join(lines)


@dataclass(frozen=True)
class Picture:
    file: Path
    caption: str
    marked: bool
    """Caption in red."""


def contact_sheet(title: str, pictures: Sequence[Picture], preprocess: Preprocess = WHOLE) -> Figure:
    """Draw images in rows: whole, or as a network sees them."""
    figure, cells = _grid(len(pictures))
    figure.suptitle(drawable(title))
    for axes, picture in zip(cells, pictures, strict=False):
        axes.imshow(_read_pixels(picture.file, preprocess))
        axes.set_title(caption(picture.caption), fontsize=7, color="tab:red" if picture.marked else "black")
    return figure

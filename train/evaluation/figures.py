"""Figures of a run, and sheets of images with captions."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from serve.contract.images import load_accepted
from serve.contract.preprocess import Preprocess
from train.data.index import ImageSet
from train.evaluation.charts import drawable, save_figure, training_curves
from train.evaluation.metrics import MOST_CLASSES
from train.evaluation.predictions import Predictions
from train.models.classifier import ImageClassifier

COLUMNS = 6  # of images
MOST_IMAGES = 3 * COLUMNS
WHOLE = Preprocess(mode="pad", size=192)
WIDEST = 26  # characters of a caption; East Asian ones count twice


def save_figures(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    best_epoch: int,
    predictions: Predictions,
    images: ImageSet,
    preprocess: Preprocess,
) -> list[Path]:
    """Draw a finished run; `rows` are those of metrics.jsonl, `predictions` those of `images`."""
    figures = {"curves": training_curves(rows, best_epoch)}
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

"""Figures of a run: curves, confusion matrix, and the validation images it got most wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from serve.preprocess import Preprocess, load_image, read_image_file
from train.data import ImageSet
from train.metrics import Evaluation

mpl.use("Agg")  # no display in a training job
MOST_CLASSES = 40  # a larger confusion matrix cannot be read
GRID = (3, 6)


def save_figures(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    evaluation: Evaluation,
    images: ImageSet,
    preprocess: Preprocess,
) -> list[Path]:
    """PNG files; `rows` are those of metrics.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"curves": _curves(rows)}
    if len(images.class_names) <= MOST_CLASSES:
        figures["confusion_matrix"] = _confusion(evaluation, images.class_names)
    figures["worst_mistakes"] = _worst(evaluation, images, preprocess)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
    return paths


def _curves(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 3.6))
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for axes, quantity in ((left, "loss"), (right, "accuracy")):
        for side, color in (("train", "tab:gray"), ("val", "tab:blue")):
            values = [row[f"{side}/{quantity}"] for row in rows]
            axes.plot(epochs, values, color=color, marker=".", label=side)
        axes.set(xlabel="epoch", ylabel=quantity, title=quantity)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _confusion(evaluation: Evaluation, class_names: tuple[str, ...]) -> Figure:
    size = max(3.5, 0.45 * len(class_names))
    figure = Figure(figsize=(size, size))
    axes = figure.subplots()
    shares = evaluation.confusion / np.maximum(1, evaluation.confusion.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(class_names))
    axes.set_xticks(ticks, class_names, rotation=45, ha="right")
    axes.set_yticks(ticks, class_names)
    axes.set(xlabel="predicted", ylabel="true", title="validation images")
    for i in ticks:
        for j in ticks:
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(evaluation.confusion[i, j]), ha="center", va="center", color=color)
    return figure


def _worst(evaluation: Evaluation, images: ImageSet, preprocess: Preprocess) -> Figure:
    """The wrongly classified images with the highest loss, as the network sees them."""
    log_probabilities = evaluation.log_probabilities
    losses = -log_probabilities[np.arange(len(images)), evaluation.labels]
    wrong = np.flatnonzero(log_probabilities.argmax(axis=1) != evaluation.labels)
    worst = wrong[np.argsort(-losses[wrong])][: GRID[0] * GRID[1]]
    figure = Figure(figsize=(2 * GRID[1], 2.3 * GRID[0]))
    figure.suptitle(f"worst of {len(wrong)} mistakes in {len(images)} validation images")
    for axes in figure.subplots(*GRID).flat:
        axes.axis("off")
    for axes, i in zip(figure.axes, worst, strict=False):
        axes.imshow(preprocess(load_image(read_image_file(images.root / images.paths[i]))))
        predicted = int(log_probabilities[i].argmax())
        true, guess = images.class_names[evaluation.labels[i]], images.class_names[predicted]
        probability = float(np.exp(log_probabilities[i, predicted]))
        name = images.paths[i].encode("utf-8", "replace").decode().rpartition("/")[2]
        axes.set_title(f"{name[:24]}\n{true}, not {guess} ({probability:.2f})", fontsize=7)
    return figure

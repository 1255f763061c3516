"""Figures of a run: curves, confusion matrix, and the validation images with the highest loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from serve.contract.preprocess import Preprocess, load_image, read_image_file
from train.data.index import ImageSet
from train.evaluation.fonts import printable
from train.evaluation.metrics import Evaluation
from train.models.classifier import ImageClassifier

mpl.use("Agg")  # no display in a training job
MOST_CLASSES = 40  # a larger confusion matrix cannot be read
GRID = (3, 6)
WIDEST = 26  # characters of a caption; East Asian ones count twice
# Okabe and Ito's colours, which the colour-blind tell apart; without yellow, too pale for a line
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")  # each set of colours again, dashed


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


@torch.inference_mode()
def save_subject_crops(
    path: Path, model: ImageClassifier, images: ImageSet, preprocess: Preprocess
) -> None:
    """Validation images, evenly spaced, each with the square that the network sees."""
    chosen = np.linspace(0, len(images) - 1, min(len(images), GRID[0] * GRID[1])).round().astype(int)
    pixels = np.stack([_look_at(images.root / images.paths[i], preprocess) for i in chosen])
    boxes = model.eval().locate(torch.from_numpy(pixels).to(model.mean.device)).cpu().numpy()
    rows = -(-len(chosen) // GRID[1])
    figure = Figure(figsize=(2 * GRID[1], 2.2 * rows))
    for axes in figure.subplots(rows, GRID[1]).flat:
        axes.axis("off")
    for axes, i, image, box in zip(figure.axes, chosen, pixels, boxes, strict=False):
        axes.imshow(image)
        left, upper, right, lower = box * preprocess.size - 0.5
        width, height = right - left, lower - upper
        axes.add_patch(
            Rectangle((left, upper), width, height, fill=False, color="yellow", linewidth=2, clip_on=False)
        )
        name = caption(printable(images.paths[i].rpartition("/")[2]))
        axes.set_title(name, fontsize=7, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def comparison_curves(runs: Mapping[str, Sequence[dict[str, Any]]], best_epochs: Sequence[int]) -> Figure:
    """Curves of several runs, with a dot at each best epoch; run name -> rows of metrics.jsonl."""
    columns = max(1, min(4, len(runs), 140 // max(map(len, runs))))  # of the legend
    figure = Figure(figsize=(13, 4.2 + 0.25 * (len(runs) // columns)), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, quantity in zip(panels, ("train/loss", "val/accuracy", "val/log_loss"), strict=True):
        for i, ((name, rows), best) in enumerate(zip(runs.items(), best_epochs, strict=True)):
            measured = [row for row in rows if quantity in row]
            epochs = [row["epoch"] for row in measured]
            axes.plot(
                epochs,
                [row[quantity] for row in measured],
                color=COLORS[i % len(COLORS)],
                linestyle=DASHES[i // len(COLORS) % len(DASHES)],
                marker="o",
                markevery=[epochs.index(best)],
                label=printable(name),
            )
        axes.set(xlabel="epoch", title=quantity)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def sweep_history(points: Sequence[tuple[int, float, bool]], metric: str, sign: int) -> Figure:
    """Trials in order and the best so far; points are (trial, value, complete), `sign` -1 for a loss."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for complete, color, marker, label in (
        (True, COLORS[0], "o", "complete"),
        (False, "tab:gray", "x", "ended early, at its last epoch"),
    ):
        part = [(number, value) for number, value, state in points if state == complete]
        if part:
            axes.scatter(*zip(*part, strict=True), color=color, marker=marker, label=label, zorder=2)
    numbers = [number for number, _, complete in points if complete]
    best = sign * np.maximum.accumulate([sign * value for _, value, complete in points if complete])
    axes.step(
        [*numbers, points[-1][0]], [*best, best[-1]], where="post", color=COLORS[1], label="best so far"
    )
    axes.set(xlabel="trial", ylabel=metric, title=f"{len(points)} trials")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def sweep_importance(importances: Mapping[str, float], metric: str, complete: int) -> Figure:
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(importances)), layout="constrained")
    axes = figure.subplots()
    names = list(importances)
    bars = axes.barh(names, list(importances.values()), color=COLORS[0])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.1), title=f"share of the variance of {metric} (fANOVA, {complete} complete trials)")
    return figure


def _curves(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 3.6))
    left, right = figure.subplots(1, 2)
    for axes, quantity in ((left, "loss"), (right, "accuracy")):
        for side, color in (("train", "tab:gray"), ("val", "tab:blue")):
            points = [
                (row["epoch"], row[f"{side}/{quantity}"]) for row in rows if f"{side}/{quantity}" in row
            ]
            axes.plot(*zip(*points, strict=True), color=color, marker=".", label=side)
        axes.set(xlabel="epoch", ylabel=quantity, title=quantity)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
    names = [printable(name) for name in class_names]
    axes.set_xticks(ticks, names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true", title="validation images")
    for i in ticks:
        for j in ticks:
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(evaluation.confusion[i, j]), ha="center", va="center", color=color)
    return figure


def _worst(evaluation: Evaluation, images: ImageSet, preprocess: Preprocess) -> Figure:
    """The images with the highest loss, as the network sees them; with few mistakes, close calls too."""
    log_probabilities = evaluation.log_probabilities
    losses = -log_probabilities[np.arange(len(images)), evaluation.labels]
    mistakes = int((log_probabilities.argmax(axis=1) != evaluation.labels).sum())
    worst = np.argsort(-losses)[: GRID[0] * GRID[1]]
    rows = -(-len(worst) // GRID[1])
    figure = Figure(figsize=(2 * GRID[1], 2.3 * rows), layout="constrained")
    figure.suptitle(f"highest loss of {len(images)} validation images ({mistakes} mistakes)")
    for axes in figure.subplots(rows, GRID[1]).flat:
        axes.axis("off")
    for axes, i in zip(figure.axes, worst, strict=False):
        axes.imshow(_look_at(images.root / images.paths[i], preprocess))
        predicted = int(log_probabilities[i].argmax())
        true, guess = images.class_names[evaluation.labels[i]], images.class_names[predicted]
        verdict = true if true == guess else f"{true},\nnot {guess}"
        probability = float(np.exp(log_probabilities[i, predicted]))
        name = images.paths[i].rpartition("/")[2]
        color = "black" if true == guess else "tab:red"
        title = caption(printable(f"{name}\n{verdict}")) + f" ({probability:.2f})"
        axes.set_title(title, fontsize=7, color=color, parse_math=False)
    return figure


def _look_at(path: Path, preprocess: Preprocess) -> NDArray[np.uint8]:
    """A file that cannot be read any more is shown as grey: a finished run must not fail for a picture."""
    try:
        return preprocess(load_image(read_image_file(path)))
    except (OSError, ValueError) as error:
        print(f"warning: {path} cannot be shown: {error}", flush=True)
        return np.full((preprocess.size, preprocess.size, 3), 128, np.uint8)


def caption(text: str) -> str:
    """Cut each line to what is as wide as a picture."""
    lines = []
    for line in text.split("\n"):
        widths = np.cumsum([1 + (east_asian_width(character) in "WF") for character in line])
        whole = not line or widths[-1] <= WIDEST
        lines.append(line if whole else f"{line[: np.searchsorted(widths, WIDEST - 1, 'right')]}…")
    return "\n".join(lines)


@dataclass(frozen=True)
class Picture:
    file: Path
    caption: str
    marked: bool
    """Caption in red."""


def contact_sheet(title: str, pictures: Sequence[Picture], columns: int) -> Figure:
    """Whole images, unlike what the network sees of them, in rows."""
    whole = Preprocess(mode="pad", size=192)
    rows = max(1, -(-len(pictures) // columns))
    figure = Figure(figsize=(2 * columns, 2.35 * rows + 0.5), layout="constrained")
    figure.suptitle(printable(title), parse_math=False)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, picture in zip(figure.axes, pictures, strict=False):
        axes.imshow(_look_at(picture.file, whole))
        color = "tab:red" if picture.marked else "black"
        axes.set_title(caption(printable(picture.caption)), fontsize=7, color=color, parse_math=False)
    return figure

"""Charts: curves of runs, calibration and coverage, for PNG files and for report.html."""

import base64
import io
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import MaxNLocator

from train.evaluation.answers import Bin

CURVES = {
    "loss (cross-entropy)": {"training": "train/loss", "validation": "val/loss"},
    "accuracy": {"training": "train/accuracy", "validation": "val/accuracy"},
    "learning rate at the end of the epoch": {"learning rate": "lr"},
}
"""Title of a panel -> line -> its metric."""
MOST_POINTS = 300  # of a line
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
mpl.rcParams["svg.fonttype"] = "none"  # the text of report.html stays text
mpl.rcParams["svg.hashsalt"] = "purebred"  # the same charts have the same bytes
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


def svg_uri(figure: Figure) -> str:
    """Return a figure as a data URI."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


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
                label=f" {drawable(name)}",  # matplotlib leaves labels that begin with _ out of a legend
            )
        axes.set(title=quantity)
        count_along(axes, "epoch")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    return figure


def training_curves(rows: Sequence[Mapping[str, Any]], best_epoch: int = 0) -> Figure:
    """Draw loss, accuracy and learning rate by epoch; `rows` are those of metrics.jsonl."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, 3), CURVES.items(), strict=True):
        for (label, quantity), color in zip(lines.items(), COLORS, strict=False):
            marker = "." if len(rows) <= MOST_POINTS else ""
            axes.plot(*_points(rows, quantity), color=color, marker=marker, label=label)
        if best_epoch:
            axes.axvline(best_epoch, color="gray", linestyle=":", label=f"best epoch {best_epoch}")
        axes.set(title=title)
        count_along(axes, "epoch")
        axes.legend()
    return figure


def _points(rows: Sequence[Mapping[str, Any]], quantity: str) -> tuple[list[int], list[float]]:
    measured = [row for row in rows if quantity in row]  # not every epoch ends with a validation
    return [row["epoch"] for row in measured], [row[quantity] for row in measured]


def count_along(axes: Axes, unit: str) -> None:
    """Label the horizontal axis with whole numbers, as of epochs or images."""
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def reliability_chart(bins: Sequence[Bin]) -> Figure:
    """Draw accuracy by probability of the likeliest class, with intervals."""
    probability, value, low, high = np.array([(b.confidence, *b.accuracy) for b in bins]).T
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=COLORS[0], label="perfectly calibrated")
    errors = np.maximum(0, [value - low, high - value])  # rounding could make one negative
    label = "images, with 95 % interval"
    axes.errorbar(probability, value, errors, color=COLORS[1], fmt="o", label=label)
    axes.set(xlabel="mean probability of the likeliest class", ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def coverage_chart(curve: Sequence[tuple[float, float]]) -> Figure:
    """Draw accuracy by share of the images that is answered, the surest first."""
    chosen = np.unique(np.linspace(0, len(curve) - 1, MOST_POINTS).round().astype(int))
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*np.array(curve)[chosen].T, color=COLORS[0], marker="." if len(chosen) == 1 else "")
    axes.set(xlabel="share that is answered, the surest first", ylabel="accuracy", xlim=(0, 1.02))
    axes.grid(alpha=0.3)
    return figure

"""Line charts as coordinates: what report.html draws as SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 360, 230  # pixels of a chart
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40  # margins
MOST_POINTS = 300  # of a line
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Coordinates in pixels from the upper left corner; ticks are (position, text)."""

    title: str
    x_label: str
    lines: Mapping[str, str]
    """Name -> points of a polyline."""
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    mark: float | None
    """Of a vertical line."""
    mark_label: str
    bars: Sequence[tuple[float, float, float, float]]
    """(x, y, lowest y, highest y) of points with intervals."""


def draw_chart(
    title: str,
    x_label: str,
    lines: Mapping[str, Points],
    *,
    x_limits: tuple[float, float] | None = None,
    whole_x: bool = False,
    mark: tuple[float, str] | None = None,
    bars: Sequence[tuple[float, float, float, float]] = (),
) -> Chart:
    """Return a chart of lines, each thinned to MOST_POINTS; what is not finite is left out.

    `bars` are (x, y, low, high) in the units of the data. Limits are those of the data by default;
    `whole_x` has ticks at whole numbers.
    """
    kept = {name: [p for p in points if all(map(isfinite, p))] for name, points in lines.items()}
    x_ticks, y_ticks = (
        _ticks([p[axis] for points in kept.values() for p in points], limits, whole)
        for axis, limits, whole in ((0, x_limits, whole_x), (1, None, False))
    )

    def x(value: float) -> float:
        return round(LEFT + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        span = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(HEIGHT - BOTTOM - span * (HEIGHT - TOP - BOTTOM), 1)

    thinned = {
        name: [
            points[i] for i in np.unique(np.linspace(0, len(points) - 1, MOST_POINTS).round().astype(int))
        ]
        for name, points in kept.items()
        if points
    }
    return Chart(
        title,
        x_label,
        {name: " ".join(f"{x(a)},{y(b)}" for a, b in points) for name, points in thinned.items()},
        [(x(tick), f"{tick:g}") for tick in x_ticks],
        [(y(tick), f"{tick:g}") for tick in y_ticks],
        x(mark[0]) if mark else None,
        mark[1] if mark else "",
        [(x(a), y(b), y(low), y(high)) for a, b, low, high in bars],
    )


def _ticks(values: Sequence[float], limits: tuple[float, float] | None, whole: bool) -> list[float]:
    """Return round numbers, between whose first and last all values lie."""
    low, high = limits or (min(values, default=0.0), max(values, default=1.0))
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=whole)
    ticks: list[float] = np.asarray(locator.tick_values(low, high)).tolist()
    return [round(tick, 12) for tick in ticks]

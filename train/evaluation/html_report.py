"""report.html: one self-contained page on a run or an evaluation, for reading without this project."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from serve.contract.files import atomic_write
from train.evaluation.answers import ReportedAnswers, look_at, slices
from train.evaluation.charts import coverage_chart, reliability_chart, svg_uri, training_curves
from train.evaluation.predictions import Predictions
from train.evaluation.significance import Interval
from train.evaluation.thumbnails import Seen, see_images

REPORT = "report.html"
REPORT_START = "<!doctype html>\n<!-- purebred report -->"
MOST_BYTES = 1_000_000
THUMBNAIL_BYTES = (600_000, 300_000, 0)  # base64 of a page; less if the page is too large
MOST_ROWS = 100  # of the table of classes
SAMPLE = 300  # images whose size and brightness is looked at
LONGEST = 60  # characters of a name
# Control characters, bytes that are not UTF-8, and marks that turn the direction of text: names are data
HIDDEN = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)


class Measure(NamedTuple):
    """A metric of the answers as they are served, and the same metric under other circumstances."""

    name: str
    interval: Interval
    other: float | None = None


@dataclass(frozen=True)
class Report:
    """What a page shows, beside what the predictions themselves hold."""

    title: str
    facts: Sequence[tuple[str, str]]
    commands: Sequence[tuple[str, str]]
    """(what for, command)"""
    measures: Sequence[Measure]
    other: str
    """What `Measure.other` is."""
    predictions: Predictions
    root: Path
    """Folder of the images."""
    classes: Sequence[Mapping[str, Any]]
    """Rows of `class_intervals`."""
    settings: Sequence[tuple[str, str]] = ()
    train_counts: Mapping[str, int] = field(default_factory=dict)
    """Class name -> number of training images."""
    rows: Sequence[Mapping[str, Any]] = ()
    """Those of metrics.jsonl."""
    best_epoch: int = 0
    threshold: float | None = None
    """Probability by which scoring estimates accuracy."""
    warnings: Sequence[str] = ()


def write_report(path: Path, report: Report) -> None:
    """Write the page, below MOST_BYTES, and replace an older one whole."""
    with atomic_write(path, "w") as file:
        file.write(render_report(report))


def render_report(report: Report) -> str:
    answers, p = look_at(report.predictions), report.predictions
    sample = np.random.default_rng(0).permutation(len(p.paths))[:SAMPLE].tolist()
    wanted = dict.fromkeys([*answers.shown, *sample])
    seen = see_images({i: report.root / p.paths[i] for i in wanted}, set(answers.shown))
    figures = {"reliability": reliability_chart(answers.bins), "coverage": coverage_chart(answers.curve)}
    if report.rows:
        figures["training"] = training_curves(report.rows, report.best_epoch)
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template.filters |= {"percent": _percent, "number": _number, "short": shortened}
    page = ""
    for most_bytes in THUMBNAIL_BYTES:
        page = template.get_template(REPORT).render(
            start=REPORT_START,
            report=report,
            answers=answers,
            predictions=p,
            images={i: shown_image(p, i) for i in answers.shown},
            thumbnails=_affordable(answers, seen, most_bytes),
            unread=[i for i in answers.shown if i not in seen],
            slices=slices(p, seen, sample),
            sampled=sum(i in seen for i in sample),
            charts={name: svg_uri(figure) for name, figure in figures.items()},
            classes=[row for row in report.classes if row["images"]],
            most_rows=MOST_ROWS,
        )
        if len(page.encode()) < MOST_BYTES:
            break
    return page


def visible(value: Any) -> Any:
    """Return text with escapes in place of HIDDEN characters; anything else as it is."""
    if type(value) is not str:
        return value
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), value)


def shortened(name: str) -> str:
    """Return a name of at most LONGEST characters: its beginning and its end."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[1 - LONGEST // 2 :]}"


def shown_image(p: Predictions, i: int) -> dict[str, Any]:
    """Return name, truth, likeliest and second class of an image, with their probabilities."""
    probabilities = p.probabilities[i]
    guess = int(p.predicted[i])
    second = max((c for c in range(len(probabilities)) if c != guess), key=probabilities.__getitem__)
    return {
        "path": p.paths[i],
        "label": p.class_names[p.labels[i]],
        "own": float(probabilities[p.labels[i]]),
        "guess": p.class_names[guess],
        "probability": float(probabilities[guess]),
        "second": p.class_names[second],
        "second_probability": float(probabilities[second]),
        "correct": bool(p.correct[i]),
    }


def _affordable(answers: ReportedAnswers, seen: Mapping[int, Seen], most_bytes: int) -> dict[int, str]:
    """Return data URIs of the first images that fit; one that is shown twice counts twice."""
    shown = [*answers.worst, *answers.suspicious, *(i for pair in answers.pairs for i in pair.images)]
    uris, left = dict[int, str](), most_bytes
    for i in answers.shown:
        if i in seen:
            left -= len(seen[i].uri) * shown.count(i)
            if left < 0:
                break
            uris[i] = seen[i].uri
    return uris


def _percent(value: float | None, digits: int = 1) -> str:
    return _number(None if value is None else 100 * value, digits)


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None or not isfinite(value) else f"{value:.{digits}f}"

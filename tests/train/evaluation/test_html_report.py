"""report.html shows the numbers of the predictions, needs nothing but itself, and takes names as data."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from train_data import draw

from train.evaluation import html_report
from train.evaluation.classes import class_intervals
from train.evaluation.html_report import (
    MOST_BYTES,
    MOST_ROWS,
    REPORT_START,
    Measure,
    Report,
    render_report,
    visible,
    write_report,
)
from train.evaluation.predictions import Predictions
from train.evaluation.significance import accuracy_interval

SVG = "data:image/svg+xml;base64,"
RESOURCES = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")


class Page(HTMLParser):
    """Tags, resources and texts of a page, and the cells of its tables."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.resources: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(page)
        self.rows = [[cell.strip() for cell in row] for row in self.rows]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.resources += [value or "" for name, value in attrs if name in RESOURCES]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def charts(page: Page) -> list[str]:
    """The text of the page's SVG images."""
    return [base64.b64decode(r.removeprefix(SVG)).decode() for r in page.resources if r.startswith(SVG)]


def answers(num_classes: int, n: int, names: tuple[str, ...] = (), **changes: Any) -> Predictions:
    rng = np.random.default_rng(num_classes)
    labels = np.arange(n) % num_classes
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += 2 + np.log(num_classes)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    paths = [f"{i % 3}/{i}.png" for i in range(n)]
    names = (*names, *(f"class{i}" for i in range(len(names), num_classes)))
    losses = -np.log(p[np.arange(n), labels])
    return Predictions("", changes.get("paths", paths), labels, p.argmax(axis=1), losses, p, names)


def report(root: Path, p: Predictions, **more: Any) -> Report:
    classes, f1 = class_intervals(p)
    measures = [Measure("accuracy", accuracy_interval(p.correct), 0.123), Measure("macro F1", f1)]
    return Report(
        "a run",
        [("model", "small")],
        [("score", "python x.py")],
        measures,
        "then",
        p,
        root,
        classes,
        **more,
    )


@pytest.mark.parametrize("num_classes", [2, 10, 200])
def test_the_page_has_the_numbers_of_the_predictions(tmp_path: Path, num_classes: int) -> None:
    p = answers(num_classes, 600)
    rows = [{"epoch": e, "lr": 0.1 / e, "train/loss": 1 / e, "val/loss": 2 / e} for e in (1, 2, 3)]
    page = render_report(report(tmp_path, p, rows=rows, best_epoch=2))
    shown = Page(page)
    assert f"{p.accuracy:.4f}" in shown.text
    by_first = {row[0]: row for row in reversed(shown.rows) if row}  # the first table that has the name
    worst = class_intervals(p)[0][0]
    cells = by_first[worst["class"]]
    assert cells[1:3] == [str(worst["images"]), f"{100 * worst['f1']:.1f}"]
    assert cells[4] == f"{100 * worst['precision']:.1f}"
    sure = p.probabilities.max(axis=1) >= 0.9
    answered = by_first["90.0"]
    assert answered[1:4] == [
        str(sure.sum()),
        f"{100 * sure.mean():.1f}",
        f"{100 * p.correct[sure].mean():.1f}",
    ]
    assert ('class="matrix"' in page) == (num_classes <= 40)
    curves, *others = charts(shown)
    assert (len(others), "best epoch 2" in curves, "learning rate" in curves) == (2, True, True)
    least = p.probabilities[np.arange(600), p.labels].argsort()
    assert p.paths[least[0]] in shown.text
    listed = sum(len(row) > 8 and row[0] in p.class_names for row in shown.rows)
    assert listed >= min(num_classes, MOST_ROWS)
    assert page.startswith(REPORT_START)


def test_nothing_outside_the_page_is_needed(tmp_path: Path) -> None:
    p = answers(3, 40)
    for i, path in enumerate(p.paths):
        draw(tmp_path / path, i, i, size=(300, 200))
    page = render_report(report(tmp_path, p))
    shown = Page(page)
    assert shown.resources
    assert all(link.startswith(("data:image/jpeg;base64,", SVG)) for link in shown.resources)
    assert len(charts(shown)) == 2, "there are no epochs to draw"
    assert not shown.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert not re.search(r"url\(|@import|https?://", page)
    assert "128 to 256" in {row[0] for row in shown.rows if row}, "no slices by size"


def test_names_are_data(tmp_path: Path) -> None:
    evil = ("<script>alert(1)</script>", '" onload="alert(1)', "a\u202eb\x07{{ 7 * 7 }}")
    paths = [f"d{i % 2}/<img src=x onerror=alert(1)>'\" {i}\udcff\n.png" for i in range(60)]
    p = answers(3, 60, evil, paths=paths)
    path = tmp_path / "report.html"
    write_report(
        path, report(tmp_path, p, rows=[{"epoch": 1, "lr": 0.1}], best_epoch=1, train_counts={evil[0]: 77})
    )
    page = path.read_text(encoding="utf-8")
    shown = Page(page)
    assert "script" not in shown.tags
    assert len(charts(shown)) == len(shown.resources)
    assert not {name for name in shown.attributes if name.startswith("on")}
    assert evil[0] in shown.text
    assert "a\\u202eb\\x07{{ 7 * 7 }}" in shown.text
    assert not re.search("[\x00-\x08\u202e\ud800-\udfff]", page)
    assert "77" in {cell for row in shown.rows for cell in row}
    assert visible("\u2066x\n") == "\\u2066x\\n"


def test_missing_images_leave_their_names(tmp_path: Path) -> None:
    p = answers(2, 20)
    draw(tmp_path / p.paths[3])
    (tmp_path / p.paths[4]).parent.mkdir(exist_ok=True)
    (tmp_path / p.paths[4]).write_bytes(b"no image")
    page = render_report(report(tmp_path, p))
    assert "data:image/jpeg;base64," in page
    assert page.count('class="none"') >= 19
    assert all(path in page for path in p.paths)


def test_many_large_images_and_long_names_stay_below_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html_report, "THUMBNAIL_BYTES", (100_000,))
    names = tuple("ü" * 240 + str(i) for i in range(1000))
    p = answers(1000, 2000, names)
    noise = np.random.default_rng(0).integers(0, 256, (96, 120, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    for path in p.paths:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).symlink_to(tmp_path / "noise.png")
    page = render_report(report(tmp_path, p, train_counts=dict.fromkeys(names, 5)))
    assert len(page.encode()) < MOST_BYTES
    tables = Page(page).rows
    assert sum(len(row) == 10 and "…" in row[0] for row in tables) == MOST_ROWS
    thumbnails = [each for each in Page(page).resources if not each.startswith(SVG)]
    assert 0 < len("".join(thumbnails)) <= 100_000
    assert "left out for size" in page

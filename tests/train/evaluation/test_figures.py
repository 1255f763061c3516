"""The figures of a run are readable pictures for any names and numbers."""

import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from train_data import draw

from serve.contract.preprocess import Preprocess
from train.data.index import ImageSet
from train.evaluation.charts import drawable, training_curves
from train.evaluation.figures import caption, save_figures
from train.evaluation.predictions import Predictions, StoredAnswers

PREPROCESS = Preprocess(size=16, resize_size=18)
ROWS: list[dict[str, Any]] = [
    {"epoch": e, "train/loss": 1 / e, "val/loss": 1.2 / e, "train/accuracy": 0.5, "val/accuracy": 0.6}
    for e in (1, 2, 3)
]


def images(root: Path, class_names: tuple[str, ...], names: list[str]) -> ImageSet:
    for i, name in enumerate(names):
        draw(root / name, i, i)
    labels = np.arange(len(names)) % len(class_names)
    return ImageSet(root, names, labels, class_names, [""] * len(names))


def answers(data: ImageSet, wrong: int) -> Predictions:
    """The first `wrong` images are taken for the next class."""
    predicted = (data.labels + (np.arange(len(data)) < wrong)) % len(data.class_names)
    logits = 3 * np.eye(len(data.class_names))[predicted]
    return StoredAnswers(list(data.paths), data.labels, data.class_names, logits).predictions("")


def figures(root: Path, data: ImageSet, wrong: int, rows: list[dict[str, Any]] = ROWS) -> dict[str, Path]:
    paths = save_figures(root / "figures", rows, 2, answers(data, wrong), data, PREPROCESS)
    for path in paths:
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 200
            assert np.asarray(image.convert("L")).std() > 3, "blank"
    return {path.stem: path for path in paths}


@pytest.mark.parametrize("wrong", [0, 1, 30], ids=["no mistakes", "one mistake", "more mistakes than room"])
def test_curves_confusion_matrix_and_mistakes_are_drawn(tmp_path: Path, wrong: int) -> None:
    data = images(tmp_path, ("cat", "dog"), [f"{i}.png" for i in range(30)])
    assert set(figures(tmp_path, data, wrong)) == {"curves", "confusion_matrix", "worst_mistakes"}


def test_a_picture_that_vanished_is_grey_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = images(tmp_path, ("cat", "dog"), [f"{i}.png" for i in range(4)])
    (tmp_path / "1.png").unlink()
    assert "worst_mistakes" in figures(tmp_path, data, 2)
    assert "1.png" in capsys.readouterr().out


def test_a_confusion_matrix_that_is_too_large_to_read_is_not_drawn(tmp_path: Path) -> None:
    data = images(tmp_path, tuple(f"breed {i}" for i in range(50)), [f"{i}.png" for i in range(50)])
    assert set(figures(tmp_path, data, 7)) == {"curves", "worst_mistakes"}


def test_epochs_without_a_validation_leave_a_gap_in_one_curve(tmp_path: Path) -> None:
    data = images(tmp_path, ("cat", "dog"), ["0.png", "1.png"])
    rows = [{name: value for name, value in row.items() if not name.startswith("val/")} for row in ROWS]
    rows = [ROWS[0], rows[1], ROWS[2]]
    figures(tmp_path, data, 1, rows)
    train, val = training_curves(rows).axes[0].lines
    assert (list(train.get_xdata()), list(val.get_xdata())) == ([1, 2, 3], [1, 3])
    assert list(val.get_ydata()) == [ROWS[0]["val/loss"], ROWS[2]["val/loss"]]


@pytest.mark.filterwarnings("error")
def test_odd_names_are_drawn_without_a_warning_and_never_read_as_formulas(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever fonts are installed: what none of them has becomes a box."""
    class_names = (r"$\frac$", "고양이", "a\nb", os.fsdecode(b"\xff"), "_" * 80)
    names = [r"$\frac$.png", "고양이.png", "a\nb.png", os.fsdecode(b"\xff.png"), "x" * 200 + ".png"]
    assert len(figures(tmp_path, images(tmp_path, class_names, names), wrong=5)) == 3
    assert caplog.text == ""
    assert capsys.readouterr() == ("", "")


def test_text_is_composed_and_odd_bytes_are_escaped() -> None:
    assert drawable(unicodedata.normalize("NFD", "고양이 é")) == "고양이 é", "fonts lack the parts"
    assert drawable(os.fsdecode(b"a\xff")) != drawable(os.fsdecode(b"a\xfe"))


def test_captions_are_no_wider_than_their_pictures() -> None:
    assert caption("0123.jpg\n" + "very " * 9) == "0123.jpg\nvery very very very very …"
    assert caption("고양이" * 9) == "고양이" * 4 + "…", "twice as wide"


def test_an_epoch_whose_loss_was_not_finite_is_left_out_of_the_curve(tmp_path: Path) -> None:
    data = images(tmp_path, ("cat", "dog"), ["0.png", "1.png"])
    rows = [*ROWS, {**ROWS[-1], "epoch": 4, "val/loss": float("nan")}]
    figures(tmp_path, data, 1, rows)
    figures(tmp_path, data, 1, rows[:1])
    _, val = training_curves(rows).axes[0].lines
    assert np.array_equal(val.get_ydata(), [*(row["val/loss"] for row in ROWS), np.nan], equal_nan=True)

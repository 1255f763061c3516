"""The note of a run: its numbers, and names and paths that stay what they are in Markdown and a shell."""

import shlex

import numpy as np
import pytest

from train.evaluation.predictions import Predictions
from train.runs.history import History
from train.runs.note import LONGEST_NAME, code_span, run_note

NAMES = ("a*b", "never seen", "c")


def test_the_note_has_accuracy_with_its_interval_and_the_worst_class_that_has_images() -> None:
    labels, predicted = np.array([0] * 6 + [2] * 4), np.array([0] * 5 + [2] * 5)
    predicted[9] = 0
    probabilities = np.full((10, 3), 1 / 3)
    answers = Predictions("", [""] * 10, labels, predicted, np.full(10, 0.25), probabilities, NAMES)
    note = run_note(answers, History(9, 7), "runs/my pets; rm x")
    # Wilson's interval of 8 of 10; F1 of the class with 3 of 4 right and 4 guesses
    for text in ("0.8000", "0.4902", "0.9433", "10 ", "0.2500", "epoch 7", "`c`", "0.7500"):
        assert text in note
    assert "never seen" not in note
    export, score = (shlex.split(line) for line in note.splitlines() if line.startswith("    "))
    assert export[1:] == ["export/main.py", "--run", "runs/my pets; rm x"]
    assert score[1:4] == ["serve/main.py", "--model", "runs/my pets; rm x"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat", "`cat`"),
        ("<img src=x>\n\n# head", "`<img src=x> # head`"),
        ("a`b``", "``` a`b`` ```"),
        ("x" * 500, f"`{'x' * (LONGEST_NAME - 3)}...`"),
    ],
)
def test_a_name_is_shown_as_it_is(name: str, shown: str) -> None:
    assert code_span(name) == shown

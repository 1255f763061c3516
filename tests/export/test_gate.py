"""What rounded arithmetic may change, and what a number of validation images can show."""

from typing import Any

import pytest

from export.gate import CONFIDENCE, check_accuracy, images_needed
from export.report import Verification
from train.evaluation.significance import paired_interval


def judged(total: int, gained: int = 0, lost: int = 0, limit: float = 0.003, **values: Any) -> Verification:
    report = Verification(
        accuracy_pytorch=0.9,
        accuracy_served=0.9 + (gained - lost) / total,
        accuracy_trained=0.9,
        gained=gained,
        lost=lost,
        max_accuracy_drop=limit,
        **values,
    )
    check_accuracy(report, total, is_whole_set=False)
    return report


@pytest.mark.parametrize(
    ("total", "gained", "lost", "fails"),
    [
        (90, 0, 1, False),  # chance
        (90, 1, 2, False),
        (90, 0, 9, True),
        (2250, 3, 9, False),  # 0.27 points
        (2250, 8, 15, False),  # 0.31 points of 23 that changed: chance
        (2250, 0, 7, True),  # 0.31 points, all in one direction
        (2250, 5, 25, True),
        (50_000, 100, 240, False),
        (50_000, 100, 260, True),
        (1000, 4, 4, False),
        (1000, 99, 9, False),  # a gain
    ],
)
def test_accuracy_fails_when_more_than_the_limit_is_lost_beyond_chance(
    total: int, gained: int, lost: int, fails: bool
) -> None:
    failures = judged(total, gained, lost).failures
    assert bool(failures) == fails
    assert all("0.3" in failure for failure in failures)


def test_too_few_images_say_how_many_would_tell() -> None:
    (note,) = judged(90, lost=1).notes
    assert f" {images_needed(0, 1, 90, 0.003)} " in note
    assert " 0.3 " in note
    assert judged(images_needed(0, 0, 90, 0.003) + 1).notes == []
    assert judged(90, lost=1, limit=0.1).notes == []


def test_no_number_below_that_of_the_images_is_reported_as_needed() -> None:
    """Three of 2,024 images are lost, one is gained: fewer would do if two were lost and two gained."""
    assert images_needed(1, 3, 2024, 0.003) < 2024
    (note,) = judged(2024, gained=1, lost=3).notes
    assert "about" not in note


def test_as_many_images_as_are_reported_as_needed_rule_the_limit_out() -> None:
    for gained, lost, n in ((0, 0, 90), (5, 5, 2250), (1, 3, 500)):
        needed = images_needed(gained, lost, n, 0.003)
        change = round((gained + lost) / 2 * needed / n)
        assert -0.0031 < paired_interval(change, change, needed, CONFIDENCE).low < -0.0025


@pytest.mark.parametrize(
    ("total", "changed", "fails"),
    [(90, 0, False), (90, 1, True), (199, 1, True), (200, 1, False), (2250, 11, False), (2250, 12, True)],
)
def test_few_images_may_change_much_and_on_few_images_none(total: int, changed: int, fails: bool) -> None:
    """Accuracy alone passed an int8 model with a probability off by 0.375 on one of 90 images."""
    failures = judged(total, largely_changed=changed, max_difference_validation=0.375).failures
    assert bool(failures) == fails
    assert all("0.25" in failure and "0.375" in failure for failure in failures)

"""Labels are listed only by models that are good enough, and only of classes that they know."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipelines.confident_learning import find_issues
from pipelines.folds import OutOfFold
from pipelines.label_issues import issue_summary


def predictions(
    sizes: Sequence[int],
    skill: float | Sequence[float] = 5.0,
    wrong: float = 0.0,
    same: tuple[int, ...] = (),
    folds: int = 2,
) -> tuple[OutOfFold, np.ndarray]:  # type: ignore[type-arg]
    """Predictions of models with a skill for each fold, which cannot tell the classes `same` apart, on data
    with a share of wrong labels; and which labels those are."""
    rng = np.random.default_rng(0)
    true = np.repeat(np.arange(len(sizes)), sizes)
    n, num_classes = len(true), len(sizes)
    numbers = np.arange(n) % folds
    logits = rng.normal(size=(n, num_classes))
    shown = np.eye(num_classes)[true]
    alike = np.isin(true, same)
    shown[np.ix_(alike, same)] = 1
    logits += np.broadcast_to(skill, folds)[numbers][:, None] * shown
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    flipped = rng.random(n) < wrong
    given = np.where(flipped, (true + rng.integers(1, num_classes, n)) % num_classes, true)
    names = tuple(f"class{i}" for i in range(num_classes))
    return OutOfFold(
        Path(), [f"{i}.png" for i in range(n)], given, probabilities, numbers + 1, names, folds
    ), flipped


@pytest.mark.parametrize(
    ("sizes", "skill"),
    [
        ([120, 120], [0.05, 0.3]),
        ([950, 50], 1.0),
        ([2, 2], 5.0),
        ([1000, 1000], 0.4),
        ([80] * 30, 0.8),
    ],
    ids=["at chance", "no better than the largest class", "too few", "doubt most labels", "many classes"],
)
def test_models_that_are_not_surely_good_enough_list_nothing(
    sizes: list[int], skill: float | list[float]
) -> None:
    with pytest.raises(ValueError, match="--weights"):
        find_issues(predictions(sizes, skill)[0])


def test_a_fold_at_chance_or_without_numbers_is_not_judged_and_the_others_are() -> None:
    data, flipped = predictions([400, 400], [0.0, 5.0, 5.0, 5.0], 0.05, folds=4)
    data.probabilities[data.folds == 2] = np.nan
    issues = find_issues(data)
    assert issues.folds_at_chance == [1, 2]
    assert set(data.folds[issues.found]) == {3, 4}
    assert flipped[issues.found].mean() > 0.8
    assert flipped[issues.found].sum() > 0.7 * flipped[issues.judged].sum()


def test_classes_that_models_cannot_tell_apart_are_not_judged_and_the_others_are() -> None:
    """All images of two breeds look alike: half of their labels would be listed."""
    data, flipped = predictions([100] * 10, 6.0, 0.03, same=(3, 4))
    issues = find_issues(data)
    assert issues.unknown_classes == [3, 4]
    assert "'class3', 'class4'" in issue_summary(data, issues)
    assert not np.isin(data.labels[issues.found], [3, 4]).any()
    assert flipped[issues.found].mean() > 0.8
    others = np.flatnonzero(flipped & ~np.isin(data.labels, [3, 4]))
    assert np.isin(others, issues.found).mean() > 0.5


def test_a_small_class_that_models_miss_is_kept() -> None:
    data, _ = predictions([600, 600, 30], 6.0)
    rare = data.labels == 2
    data.probabilities[rare] = [0.9989, 0.001, 0.0001]
    issues = find_issues(data)
    assert issues.unknown_classes == [2]
    assert not rare[issues.found].any()


@pytest.mark.parametrize(
    ("sizes", "folds", "wrong"),
    [([990, 10], 5, 0.0), ([950, 50], 2, 0.01), ([4] * 120, 2, 0.02), ([10, 10], 5, 0.0)],
    ids=["1 % of one class", "5 % of one class", "4 of each of 120", "2 of each class in each fold"],
)
def test_good_models_of_small_or_unbalanced_data_judge_all_of_it(
    sizes: list[int], folds: int, wrong: float
) -> None:
    data, flipped = predictions(sizes, 9.0, wrong, folds=folds)
    issues = find_issues(data)
    assert (issues.folds_at_chance, issues.unknown_classes) == ([], [])
    assert flipped[issues.found].all()
    assert len(issues.found) >= flipped.sum() / 2

"""Validation by share or by fold: groups stay together, every class can be trained, folds cover all."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from serve.contract.errors import UserError
from train.data.split import choose_fold, choose_validation

NAMES = ("ant", "bee", "cat")


def share(labels: list[int], groups: list[str], fraction: float = 0.2, seed: int = 0) -> list[bool]:
    mask: list[bool] = choose_validation(labels, groups, NAMES, fraction, seed, []).tolist()
    return mask


def fold_of(labels: list[int], groups: list[str], folds: int, seed: int = 0) -> list[int]:
    """Of each image the fold that validates it, 0 for none; fails if it is in two."""
    parts = [choose_fold(labels, groups, NAMES, folds, k, seed, []) for k in range(1, folds + 1)]
    assert np.sum(parts, axis=0).max() <= 1
    return [int(k) for k in np.sum([k * part for k, part in enumerate(parts, 1)], axis=0)]


def singles(count: int) -> list[str]:
    return [f"group{i}" for i in range(count)]


def test_a_group_larger_than_what_is_wanted_is_trained_on() -> None:
    groups = ["much"] * 60 + singles(40)
    is_val = share([0] * 100, groups, 0.15)
    assert sum(is_val) == 15
    assert not any(is_val[:60])


def test_classes_of_the_same_pictures_are_named() -> None:
    with pytest.raises(UserError, match="2 pictures are in 'ant', 'bee'"):
        share([0, 0, 1, 1], singles(2) * 2)


def test_of_two_groups_the_smaller_one_validates() -> None:
    assert sum(share([0] * 9 + [1, 1], ["much"] * 8 + ["little", "b", "c"])) == 2


def test_folds_are_disjoint_cover_every_image_and_are_stratified() -> None:
    labels = [0] * 100 + [1] * 40 + [2] * 10
    folds = fold_of(labels, singles(150), 5)
    assert set(folds) == {1, 2, 3, 4, 5}
    counts = Counter(zip(labels, folds, strict=True))
    for label, size in enumerate((20, 8, 2)):
        assert {counts[label, fold] for fold in range(1, 6)} == {size}


@pytest.mark.parametrize("twice", [0, 30], ids=["one label", "two labels"])
def test_folds_are_a_function_of_content_and_seed(twice: int) -> None:
    """Not of the order of the images, though copies have two labels."""
    labels, groups = [0] * 90 + [1] * twice, singles(90) + singles(twice)
    folds = dict(zip(groups, fold_of(labels, groups, 3), strict=True))
    assert dict(zip(groups[::-1], fold_of(labels[::-1], groups[::-1], 3), strict=True)) == folds
    assert dict(zip(groups, fold_of(labels, groups, 3, seed=1), strict=True)) != folds


def test_adding_images_moves_few_to_another_fold() -> None:
    groups = singles(1100)
    before, after = fold_of([0] * 1000, groups[:1000], 4), fold_of([0] * 1100, groups, 4)
    assert sum(a != b for a, b in zip(before, after, strict=False)) < 50


def test_copies_with_two_labels_are_in_one_fold_with_a_warning() -> None:
    labels = [0, 1, *[0] * 20, *[1] * 20]
    groups = ["same", "same", *singles(40)]
    folds = fold_of(labels, groups, 4)
    assert folds[0] == folds[1] > 0
    notes: list[str] = []
    choose_fold(labels, groups, NAMES[:2], 4, 1, 0, notes)
    (note,) = notes
    assert note.startswith("warning: 1 pictures ")


def test_a_class_of_one_picture_is_in_no_fold_with_a_warning() -> None:
    labels, groups = [0] * 10 + [1, 1, 1], [*singles(10), "one", "one", "one"]
    folds = fold_of(labels, groups, 5)
    assert folds[10:] == [0, 0, 0]
    assert 0 not in folds[:10]
    notes: list[str] = []
    choose_fold(labels, groups, NAMES[:2], 5, 1, 0, notes)
    assert any(note.startswith("warning: class 'bee' ") for note in notes)


def test_a_small_class_is_missing_in_some_folds_with_a_warning() -> None:
    labels = [0] * 50 + [1, 1]
    warned = []
    for fold in range(1, 6):
        notes: list[str] = []
        choose_fold(labels, singles(52), NAMES[:2], 5, fold, 0, notes)
        warned.append(bool(notes))
        assert all("class 'bee' " in note and f"fold {fold} of 5" in note for note in notes)
    assert sum(warned) == 3


def test_a_fold_without_images_is_an_error_that_names_the_flags() -> None:
    with pytest.raises(ValueError, match="--fold 2 of --folds 9 "):
        choose_fold([0, 0, 1, 1], singles(4), NAMES[:2], 9, 2, 0, [])


label_and_group = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=2, max_size=40)


@given(label_and_group, st.integers(2, 6), st.integers(0, 3))
@hypothesis_settings(max_examples=300, deadline=None)
def test_in_every_fold_each_class_is_trained_and_no_group_is_divided(
    rows: list[tuple[int, int]], folds: int, seed: int
) -> None:
    labels, groups = [label for label, _ in rows], [str(group) for _, group in rows]
    seen = np.zeros(len(rows), int)
    for fold in range(1, folds + 1):
        try:
            is_val = choose_fold(labels, groups, NAMES, folds, fold, seed, [])
        except ValueError:
            continue
        seen += is_val
        assert {labels[i] for i in np.flatnonzero(~is_val)} == set(labels)
        assert not {groups[i] for i in np.flatnonzero(is_val)} & {
            groups[i] for i in np.flatnonzero(~is_val)
        }
    assert seen.max(initial=0) <= 1
    of_class = [{group for label, group in rows if label == wanted} for wanted in range(3)]
    for wanted, own in enumerate(of_class):
        others = set().union(*(of_class[label] for label in range(3) if label != wanted))
        if len(own) > 1 and not own & others:
            assert all(seen[np.array(labels) == wanted] == 1)

"""Split strategies: a share of each class, or one of K folds, as functions of content and seed.

A group of images that show the same picture (duplicates.py) stays on one side. Groups are taken in the
order of a hash of group and seed, so that adding images moves few others.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError
from train.data.labels import listed, warn_of_classes


def choose_validation(
    labels: Sequence[int],
    groups: Sequence[str],
    class_names: Sequence[str],
    fraction: float,
    seed: int,
    notes: list[str],
) -> NDArray[np.bool_]:
    """Return [N], true for the images to validate on: about `fraction` of each class.

    Every class keeps an image to train on: one with a single group has none to validate on. A group with
    two labels is only trained on. A group larger than what its class still needs is skipped: fifty copies
    of a picture measure little. Raises UserError when no image is left to validate on.
    """
    members = _members(groups)
    mixed = {group for group, images in members.items() if len({labels[i] for i in images}) > 1}
    if mixed:
        notes.append(
            f"warning: {len(mixed)} pictures occur under more than one label: kept for training only"
        )
    chosen: list[int] = []
    absent: list[str] = []
    for label, ordered in enumerate(_by_class(labels, members, len(class_names), seed)):
        clear = [group for group in ordered if group not in mixed]  # a contradiction validates nothing
        wanted = max(1, round(fraction * sum(len(members[group]) for group in clear)))
        taken: list[str] = []
        for group in clear[:-1]:  # the last one stays for training
            if len(members[group]) <= wanted:
                taken.append(group)
                wanted -= len(members[group])
        if not taken and len(clear) > 1:
            taken = [min(clear, key=lambda group: len(members[group]))]
        if not taken:
            absent.append(class_names[label])
        chosen += [i for group in taken for i in members[group]]
    notes += warn_of_classes(absent, "no image to validate on")
    if not chosen:
        twice = sorted({labels[i] for i in members[min(mixed)]}) if mixed else []
        both = f" ({len(mixed)} pictures are in {listed([class_names[k] for k in twice])})" if twice else ""
        raise UserError(
            f"no class has two different images of its own{both}, so none can be set aside: add images, or "
            "give --val-data"
        )
    is_val = np.zeros(len(labels), bool)
    is_val[chosen] = True
    return is_val


def choose_fold(
    labels: Sequence[int],
    groups: Sequence[str],
    class_names: Sequence[str],
    folds: int,
    fold: int,
    seed: int,
    notes: list[str],
) -> NDArray[np.bool_]:
    """Return [N], true for the images of part `fold`, 1 to `folds`; the parts are disjoint and cover all.

    A group with two labels is in one part like any other. A class all of whose images would be in one part
    is in none: that part's model could not have learnt it. Raises UserError when the part is empty.
    """
    members = _members(groups)
    part = np.zeros(len(labels), np.int64)
    for ordered in _by_class(labels, members, len(class_names), seed):
        total, before = sum(len(members[group]) for group in ordered), 0
        for group in ordered:
            size = len(members[group])
            # by the group's middle: the first and the last group of a class are never in one part
            part[members[group]] = 1 + (2 * before + size) * folds // (2 * total)
            before += size
    images_of: list[list[int]] = [[] for _ in class_names]
    for i, label in enumerate(labels):
        images_of[label].append(i)
    alone: list[str] = []
    for name, images in zip(class_names, images_of, strict=True):
        if len(set(part[images].tolist())) == 1:
            for group in {groups[i] for i in images}:
                part[members[group]] = 0
            alone.append(name)
    notes += warn_of_classes(alone, "no two different images (always trained on, in no fold)")
    mixed = sum(len({labels[i] for i in images}) > 1 for images in members.values())
    if mixed:
        notes.append(
            f"warning: {mixed} pictures occur under more than one label; in a fold they are validated too"
        )
    is_val: NDArray[np.bool_] = part == fold
    if not is_val.any():
        raise UserError(f"--fold {fold} of --folds {folds} has no image to validate on: use fewer folds")
    present = {labels[i] for i in np.flatnonzero(is_val).tolist()}
    absent = [name for label, name in enumerate(class_names) if label not in present]
    notes += warn_of_classes(absent, f"no image to validate on in fold {fold} of {folds}")
    return is_val


def _members(groups: Sequence[str]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    return members


def _by_class(
    labels: Sequence[int], members: dict[str, list[int]], num_classes: int, seed: int
) -> list[list[str]]:
    """Return the groups of each class in hash order; one with two labels counts to the lower label."""
    by_class: list[list[str]] = [[] for _ in range(num_classes)]
    for group, images in members.items():
        by_class[min(labels[i] for i in images)].append(group)
    for groups in by_class:
        groups.sort(key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    return by_class

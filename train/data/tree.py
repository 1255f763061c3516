"""Folders and the images below them, as paths: what is in which, without asking the disk again."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable

from train.data.webdataset import FLAT_NAME

Tree = dict[str, list[str]]
"""Folder -> the images below it, relative to it."""


def images_in(paths: Iterable[str]) -> list[str]:
    return [path for path in paths if "/" not in path]


def folders_in(paths: Iterable[str]) -> Tree:
    """The folders in it, and what is below each."""
    tree: Tree = defaultdict(list)
    for path in paths:
        folder, slash, rest = path.partition("/")
        if slash:
            tree[folder].append(rest)
    return dict(tree)


def unwrap(paths: list[str]) -> tuple[str, list[str]]:
    """(folders on the way, paths) of the first folder that holds images or several folders."""
    on_the_way = []
    while len(inside := folders_in(paths)) == 1 and not images_in(paths):
        ((folder, paths),) = inside.items()
        on_the_way.append(folder)
    return "/".join(on_the_way), paths


def inside(paths: list[str]) -> Tree:
    return folders_in(unwrap(paths)[1])


def classes_in(paths: list[str]) -> set[str]:
    """The names that would be classes if this were the folder to train on, when there are several."""
    _, paths = unwrap(paths)
    names = set(folders_in(paths))
    if direct := images_in(paths):
        found = [FLAT_NAME.match(os.path.splitext(path)[0]) for path in direct]
        labels = Counter(match["label"] if match else "" for match in found)
        names = set(labels) if "" not in labels and min(labels.values()) > 1 else set()
    return names if len(names) > 1 else set()

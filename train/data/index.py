"""Index of a labelled data set: its images, their labels, and the split into training and validation.

`prepare_data` does it in order: find the labels (layouts/), check them (labels.py), read every image once
(scan.py), find pictures that are there more than once (duplicates.py), and split (split.py).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError
from train.config import TrainConfig
from train.data.duplicates import NearDuplicate, labels_decide, near_duplicates
from train.data.labels import LabelledPaths, listed, spelling_hints, unify, warn_of_classes
from train.data.layouts.folder_tree import Folder
from train.data.layouts.label_file import matches as is_label_file
from train.data.layouts.label_file import read_excluded
from train.data.layouts.registry import find_labels
from train.data.layouts.soft_labels import soft_targets
from train.data.scan import scan
from train.data.split import choose_fold, choose_validation
from train.distributed import Ranks
from train.shared_memory import Texts, share


@dataclass(frozen=True)
class ImageSet:
    """N labelled images; `labels[i]` is the index in `class_names` of `paths[i]`."""

    root: Path
    paths: Sequence[str]
    """[N], relative to `root` (a label file may name absolute ones)."""
    labels: NDArray[np.int64]
    """[N]"""
    class_names: tuple[str, ...]
    sha256: Sequence[str]
    """[N], hexadecimal, of each file's bytes."""
    targets: NDArray[np.float32] | None = None
    """[N, num_classes], probabilities to train towards in place of the labels; None: the labels."""

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: NDArray[np.int64]) -> "ImageSet":
        """Return the images at `indices` [M], in that order."""
        return replace(
            self,
            paths=[self.paths[i] for i in indices],
            labels=self.labels[indices],
            sha256=[self.sha256[i] for i in indices],
            targets=None if self.targets is None else self.targets[indices],
        )

    def shared(self, ranks: Ranks, folder: Path) -> "ImageSet":
        """Return the same set in arrays that a machine holds once. Every rank must call it."""
        paths, sha256 = Texts.of(self.paths), Texts.of(self.sha256)
        arrays: list[NDArray[Any]] = [paths.data, paths.ends, self.labels, sha256.data, sha256.ends]
        arrays += [] if self.targets is None else [self.targets]
        names, ends, labels, hashes, hash_ends, *targets = share(arrays, ranks, folder)
        return replace(
            self,
            paths=Texts(names, ends),
            labels=labels,
            sha256=Texts(hashes, hash_ends),
            targets=targets[0] if targets else None,
        )

    def digest(self) -> str:
        """Return the sha256 of class names, labels and contents: of these images alone."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        digest.update("".join(self.sha256).encode())
        return digest.hexdigest()

    def counts(self) -> dict[str, int]:
        """Return class name -> number of images."""
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))


@dataclass(frozen=True)
class Data:
    """What a run trains and validates on."""

    train: ImageSet
    val: ImageSet
    bad: dict[str, str]
    """Unreadable file, which is left out -> why."""
    digest: str
    """sha256 of the names, labels and contents of both sets and of the class names."""
    notes: list[str]
    """Lines for the user: the layout, what was left out, warnings."""
    content_digest: str = ""
    """The same of all images before the split: the folds of one data set share it."""
    near: dict[str, NearDuplicate] = field(default_factory=dict)
    """sha256 -> group, for images that look the same as another file."""

    def shared(self, ranks: Ranks, folder: Path) -> "Data":
        """Return the same data in arrays that a machine holds once. Every rank must call it."""
        return replace(self, train=self.train.shared(ranks, folder), val=self.val.shared(ranks, folder))


def prepare_data(config: TrainConfig) -> Data:
    """Index, scan and split what `config` names.

    Raises:
        UserError: nothing to train on, or too much of it unreadable; the message says what to do.
    """
    notes: list[str] = []
    found, held_out = find_images(config, notes)
    train = _read(found, config.data, "--data", config, notes)
    if not held_out:
        near = _near_duplicates([train], config)
        digest = _digest(train.images)
        train_set, val_set = split(train.images, config, near, notes)
        return Data(train_set, val_set, train.bad, _digest(train_set, val_set), notes, digest, near)
    source = config.val_data or config.data
    val = _read(held_out, source, "--val-data", config, notes)
    val = val._replace(images=_map_classes(val.images, train.images.class_names))
    absent = [name for name, count in val.images.counts().items() if not count]
    notes += warn_of_classes(absent, f"no image to validate on in {source}")
    near = _near_duplicates([train, val], config)
    notes += _warn_of_leaks(train.images, val.images, near, _origin(config))
    digest = _digest(train.images, val.images)
    return Data(train.images, val.images, train.bad | val.bad, digest, notes, digest, near)


def find_images(config: TrainConfig, notes: list[str]) -> tuple[LabelledPaths, LabelledPaths | None]:
    """Return the images to train on and those to validate on, None where a share of the former validates;
    none of them is read. Raises UserError when they or their classes cannot be used."""
    found = _find(config.data, "--data", config, notes)
    class_names = sorted(set(found.labels.values()), key=natural_key)
    if len(class_names) < 2:
        raise UserError(f"{config.data} has one class, {class_names[0]!r}; a classifier needs two or more")
    if config.columns and not any(map(is_label_file, (Path(config.data), Path(config.val_data)))):
        raise UserError(f"--columns {config.columns} has no effect: {config.data} is no label file (CSV)")
    held_out = _held_out(found, config, notes)
    if held_out:
        _check_classes(held_out.labels, class_names, config)
    return found, held_out


def _origin(config: TrainConfig) -> str:
    """Return how a message names the images to validate on."""
    own = f"what {config.data} sets aside for validation"
    return f"--val-data {config.val_data}" if config.val_data else own


class _Read(NamedTuple):
    images: ImageSet
    thumbnails: NDArray[np.uint8]  # [N, 8, 8]
    bad: dict[str, str]  # unreadable file -> why


def _find(source: str, flag: str, config: TrainConfig, notes: list[str]) -> LabelledPaths:
    """Find the images of `source` and their labels, in their normal forms."""
    found = find_labels(Path(source), config.data_format, flag, config.columns)
    spellings: list[str] = []
    labels = unify(found.labels | found.validation, source, spellings)
    notes += [f"{source}: {len(labels)} images, {found.layout}", *spellings]
    notes += [f"warning: {source}: {warning}" for warning in found.warnings]
    return replace(
        found,
        labels={path: labels[path] for path in found.labels},
        validation={path: labels[path] for path in found.validation},
    )


def _held_out(found: LabelledPaths, config: TrainConfig, notes: list[str]) -> LabelledPaths | None:
    """Return the images to validate on: those of --val-data, or those that the data set sets aside."""
    if config.val_data:
        if found.validation:
            count = len(found.validation)
            notes.append(
                f"warning: {count} images to validate on in {config.data} are left out for --val-data"
            )
        found = _find(config.val_data, "--val-data", config, notes)
        return replace(found, probabilities={})  # validation compares with the labels
    if not found.validation:
        return None
    if config.folds:
        raise UserError(
            f"--folds {config.folds} has no effect: {config.data} names {len(found.validation)} images to "
            "validate on; remove the column that names them"
        )
    notes.append(f"{len(found.validation)} of them validate, as {config.data} names them")
    return replace(found, labels=found.validation, validation=found.labels, probabilities={})


def _read(found: LabelledPaths, source: str, flag: str, config: TrainConfig, notes: list[str]) -> _Read:
    """Scan the images that were found; those that --exclude names and unreadable ones are left out."""
    class_names = tuple(sorted(set(found.labels.values()), key=natural_key))
    if config.exclude and (flag == "--data" or not config.val_data):
        found = exclude(found, config.exclude, source, notes if flag == "--data" else [])
    labels = found.labels
    result = scan(found.root, sorted(labels), Path(config.output) / ".cache", config.max_megapixels)
    if len(result.bad) > config.max_bad * len(labels):
        first = "; ".join(f"{path!r}: {why}" for path, why in list(result.bad.items())[:3])
        raise UserError(
            f"{len(result.bad)} of {len(labels)} images in {source} are unreadable, more than "
            f"--max-bad {config.max_bad:g} allows ({first}); repair or convert them, name them in a CSV "
            "file for --exclude, or raise --max-bad"
        )
    notes.extend(f"warning: {source}: {line}" for line in result.doubts.lines())
    paths = list(result.sha256)
    if empty := set(class_names) - {labels[path] for path in paths}:
        name = min(empty, key=natural_key)
        bad = (f"{path!r}: {why}" for path, why in result.bad.items() if labels[path] == name)
        reason = next(bad, f"--exclude {config.exclude} names all of them")
        raise UserError(
            f"class {name!r} in {source} has no readable image ({reason}); repair or convert its files, or "
            "leave the class out"
        )
    index = {name: i for i, name in enumerate(class_names)}
    images = ImageSet(
        found.root,
        paths,
        np.array([index[labels[path]] for path in paths], np.int64),
        class_names,
        list(result.sha256.values()),
        soft_targets(paths, found, class_names, source),
    )
    return _Read(
        images, result.thumbnails, {str(found.root / path): why for path, why in result.bad.items()}
    )


def exclude(found: LabelledPaths, file: str, source: str, notes: list[str]) -> LabelledPaths:
    """Return `found` without the images that the CSV file names, and add a line to the notes.

    Raises UserError when the file cannot be read, or names an image that is not in `source`.
    """
    excluded = read_excluded(file)
    known = found.labels.keys() | found.validation.keys()
    if unknown := [path for path in excluded if path not in known]:
        raise UserError(
            f"--exclude {file} names {len(unknown)} images that are not in {source} "
            f"({listed(unknown, 3)}): write paths relative to {source}"
        )
    left_out = set(excluded)
    labels = {path: label for path, label in found.labels.items() if path not in left_out}
    notes.append(f"{len(excluded)} of them are left out, as {file} names them")
    return replace(found, labels=labels)


def natural_key(text: str) -> tuple[list[tuple[int, int | str]], str]:
    """Return a key that sorts "2" before "10"; different texts ("1", "01") have different keys."""
    parts = re.split(r"([0-9]+)", text)
    return [(0, int(part)) if part[0] in "0123456789" else (1, part) for part in parts if part], text


def _check_classes(held_out: Mapping[str, str], class_names: Sequence[str], config: TrainConfig) -> None:
    """Raise UserError when images to validate on have classes that the training data lack."""
    if unknown := sorted(set(held_out.values()) - set(class_names), key=natural_key):
        hints = spelling_hints(unknown, class_names)
        parent, folder = Folder.of(held_out).unwrap()
        source = Path(config.val_data or config.data)
        inside = source / parent
        if parent and inside.is_dir() and folder.folders.keys() & set(class_names):
            hints.append(f"; its folder {parent!r} has them: give --val-data {inside}")
        numbered = all(map(str.isdecimal, class_names)) and not any(map(str.isdecimal, unknown))
        if numbered and is_label_file(source) and any(source.parent.glob("*.json")):
            hints.append(
                "; a JSON file of class names beside the label files fits only one of them: remove the "
                "names of classes without images from it, or move it away"
            )
        raise UserError(
            f"{_origin(config)} has the classes {listed(unknown)}, and the training data have only "
            f"{listed(class_names)}{''.join(hints)}"
        )


def _map_classes(val: ImageSet, class_names: tuple[str, ...]) -> ImageSet:
    """Return `val` with the labels of the training data's classes."""
    positions = {name: i for i, name in enumerate(class_names)}
    index = np.array([positions[name] for name in val.class_names], np.int64)
    return replace(val, labels=index[val.labels], class_names=class_names)


def _near_duplicates(sets: Sequence[_Read], config: TrainConfig) -> dict[str, NearDuplicate]:
    if not config.near_duplicates:
        return {}
    files = [each.images.root / path for each in sets for path in each.images.paths]
    sha256 = [digest for each in sets for digest in each.images.sha256]
    return near_duplicates(files, sha256, np.concatenate([each.thumbnails for each in sets]))


def _warn_of_leaks(train: ImageSet, val: ImageSet, near: dict[str, NearDuplicate], which: str) -> list[str]:
    """Return warnings about validation images that are training images too."""
    same = set(train.sha256) & set(val.sha256)
    groups = set(groups_of(train, near))
    alike = [h for h in set(val.sha256) - same if h in near and near[h].group in groups]
    counts = {"": len(same), " (re-encoded, resized or a little brighter)": len(alike)}
    return [
        f"warning: {count} images of {which} are also trained on{how}: validation flatters the model"
        for how, count in counts.items()
        if count
    ]


def groups_of(images: ImageSet, near: dict[str, NearDuplicate]) -> list[str]:
    """Return [N] groups of images that show the same picture; one without copies is its own group."""
    return [near[sha256].group if sha256 in near else sha256 for sha256 in images.sha256]


def split(
    images: ImageSet, config: TrainConfig, near: dict[str, NearDuplicate], notes: list[str]
) -> tuple[ImageSet, ImageSet]:
    """Return (train, val) by the strategy of `config`; copies and near duplicates stay together."""
    labels = images.labels.tolist()
    files = len(set(images.sha256))
    if copies := len(images) - files:
        notes.append(f"images that are copies of others: {copies}; copies stay on one side of the split")
    groups = groups_of(images, near)
    if alike := files - len(set(groups)):
        if labels_decide(groups, labels, near):
            notes.append(
                "warning: images that look the same often differ in their labels; only identical files "
                "stay on one side of the split"
            )
            groups = list(images.sha256)
        else:
            notes.append(
                "images that are near duplicates of others (re-encoded, resized, a little brighter): "
                f"{alike}; they too stay on one side"
            )
    if config.folds:
        strategy = partial(choose_fold, folds=config.folds, fold=config.fold)
    else:
        strategy = partial(choose_validation, fraction=config.val_fraction)
    is_val = strategy(labels, groups, images.class_names, seed=config.seed, notes=notes)
    return images.take(np.flatnonzero(~is_val)), images.take(np.flatnonzero(is_val))


def _digest(*sets: ImageSet) -> str:
    digest = hashlib.sha256(repr(sets[0].class_names).encode())
    for images in sets:
        for path, label, sha256 in zip(images.paths, images.labels, images.sha256, strict=True):
            digest.update(f"\n{path!r},{label},{sha256}".encode())
        if images.targets is not None:
            digest.update(images.targets.tobytes())
        digest.update(b"\n--")
    return digest.hexdigest()


def class_weights(images: ImageSet) -> list[float]:
    """Return n / (num_classes * n_c) for each class c, whose mean over the images is 1.

    Source: scikit-learn's "balanced".
    """
    num_classes = len(images.class_names)
    return [len(images) / (num_classes * max(1, count)) for count in images.counts().values()]

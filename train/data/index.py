"""Index a labelled data set and split it: four layouts in, arrays of paths and labels out."""

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError
from train.config import TrainConfig
from train.data.duplicates import Near, labels_decide, near_duplicates
from train.data.label_file import read_excluded, read_manifest, read_soft_labels, soft_targets
from train.data.labels import check_known, unify
from train.data.layouts import flat_labels, folder_labels, recognise, tar_parts
from train.data.parts import folder_of_classes
from train.data.scan import scan
from train.data.split import choose_fold, choose_validation
from train.data.webdataset import tar_labels, tar_root
from train.distributed import Ranks
from train.shared_memory import Texts, share

MANIFEST = "labels from a CSV manifest"


@dataclass(frozen=True)
class ImageSet:
    """Labelled images; `labels[i]` is the index in `class_names` of `paths[i]`."""

    root: Path
    paths: Sequence[str]
    """Relative to root (a manifest may name absolute ones)."""
    labels: NDArray[np.int64]
    """[N]"""
    class_names: tuple[str, ...]
    sha256: Sequence[str]
    """Of each file's bytes."""
    targets: NDArray[np.float32] | None = None
    """[N, num_classes], probabilities to be trained towards in place of the labels; None: the labels."""

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: NDArray[np.int64]) -> "ImageSet":
        return ImageSet(
            self.root,
            [self.paths[i] for i in indices],
            self.labels[indices],
            self.class_names,
            [self.sha256[i] for i in indices],
            None if self.targets is None else self.targets[indices],
        )

    def shared(self, ranks: Ranks, folder: Path) -> "ImageSet":
        """The same, without an object for each image, and once on each machine. Every rank must call it."""
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

    def counts(self) -> dict[str, int]:
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))


@dataclass(frozen=True)
class Data:
    train: ImageSet
    val: ImageSet
    bad: dict[str, str]
    """Unreadable files that were left out, and why."""
    digest: str
    """sha256 over names, labels and contents of both sets, and over the class names."""
    notes: list[str]
    """What a user should know: the layout found, warnings."""
    content_digest: str = ""
    """The same however the images are split: folds of one data set have one."""
    near: dict[str, Near] = field(default_factory=dict)
    """sha256 -> group, of images that look the same and are different files."""

    def shared(self, ranks: Ranks, folder: Path) -> "Data":
        """The same, with its lists once on each machine. Every rank must call it."""
        return replace(self, train=self.train.shared(ranks, folder), val=self.val.shared(ranks, folder))


def prepare_data(config: TrainConfig) -> Data:
    """Index, scan and split what `config` names.

    Raises:
        UserError: nothing to train on, or too much of it unreadable; the message says what to do.
    """
    notes: list[str] = []
    excluded = read_excluded(config.exclude)
    train, thumbnails, bad = _readable(config.data, "--data", config, excluded, notes)
    if len(train.class_names) < 2:
        raise UserError(
            f"{config.data} has the one class {train.class_names[0]!r}; a classifier needs two or more"
        )
    if not config.val_data:
        near = _near_duplicates([train], thumbnails, config)
        content = _digest(train)
        train, val = split(train, config, near, notes)
        return Data(train, val, bad, _digest(train, val), notes, content, near)
    val, val_thumbnails, bad_val = _readable(config.val_data, "--val_data", config, [], notes)
    val = _map_classes(val, train.class_names, config.val_data)
    notes.extend(
        f"warning: class {name!r} has no image to validate on in {config.val_data}"
        for label, name in enumerate(val.class_names)
        if not (val.labels == label).any()
    )
    near = _near_duplicates([train, val], np.concatenate([thumbnails, val_thumbnails]), config)
    shared = set(train.sha256) & set(val.sha256)
    alike = [h for h in set(val.sha256) & set(near) if h not in shared]
    groups = set(groups_of(train, near))
    for count, how in (
        (len(shared), "also"),
        (sum(near[h].group in groups for h in alike), "(re-encoded, resized or a little brighter) also"),
    ):
        if count:
            notes.append(
                f"warning: {count} images of {config.val_data} are {how} in {config.data}: "
                "validation flatters the model"
            )
    digest = _digest(train, val)
    return Data(train, val, bad | bad_val, digest, notes, digest, near)


def _near_duplicates(
    sets: list[ImageSet], thumbnails: NDArray[np.uint8], config: TrainConfig
) -> dict[str, Near]:
    if not config.near_duplicates:
        return {}
    files = [images.root / path for images in sets for path in images.paths]
    return near_duplicates(files, [h for images in sets for h in images.sha256], thumbnails)


def _readable(
    source: str, flag: str, config: TrainConfig, excluded: list[str], notes: list[str]
) -> tuple[ImageSet, NDArray[np.uint8], dict[str, str]]:
    """(images, their thumbnails, unreadable files -> why)"""
    root, labels, layout, problems = find_labels(Path(source), config.data_format, flag)
    soft = read_soft_labels(Path(source)) if layout.startswith(MANIFEST) else {}
    spellings: list[str] = []
    labels = unify(labels, source, spellings)
    class_names = tuple(sorted(set(labels.values()), key=natural_key))
    notes += [f"{source}: {len(labels)} images, {layout}", *spellings]
    if excluded:
        unknown = [path for path in excluded if path not in labels]
        if unknown:
            raise UserError(
                f"--exclude {config.exclude} names {len(unknown)} images that are not in {source} "
                f"({', '.join(map(repr, unknown[:3]))}): paths are relative to it"
            )
        left = set(labels) - set(excluded)
        labels = {path: label for path, label in labels.items() if path in left}
        empty = sorted(set(class_names) - set(labels.values()), key=natural_key)
        if empty:
            raise UserError(
                f"--exclude {config.exclude} leaves no image of class {empty[0]!r}: strike some out of "
                f"that list, or take the class out of {source}"
            )
        notes.append(f"{len(excluded)} of them are left out, as {config.exclude} says")
    paths = sorted(labels)
    notes.extend(f"warning: {source}: {problem}" for problem in problems)
    result = scan(root, paths, Path(config.output) / ".cache")
    if len(result.bad) > config.max_bad * len(paths):
        first = "; ".join(f"{path!r}: {why}" for path, why in list(result.bad.items())[:3])
        raise UserError(
            f"{len(result.bad)} of {len(paths)} images in {source} are unreadable, more than "
            f"--max-bad {config.max_bad:g} allows ({first}); repair or convert them, name them in a CSV "
            "file for --exclude, or raise --max-bad"
        )
    notes.extend(f"warning: {source}: {line}" for line in result.doubts().lines())
    good = [path for path in paths if path in result.sha256]
    readable = {labels[path] for path in good}
    for name in class_names:
        if name not in readable:
            first = next(f"{path!r}: {why}" for path, why in result.bad.items() if labels[path] == name)
            raise UserError(
                f"class {name!r} in {source} has no readable image ({first}); repair or convert its files, "
                f"or leave the class out of {source}"
            )
    index = {name: i for i, name in enumerate(class_names)}
    image_set = ImageSet(
        root,
        good,
        np.array([index[labels[path]] for path in good], np.int64),
        class_names,
        [result.sha256[path] for path in good],
        soft_targets(good, labels, soft, class_names, source) if soft else None,
    )
    return image_set, result.thumbnails, {str(root / path): why for path, why in result.bad.items()}


def find_labels(
    source: Path, data_format: str, flag: str = "--data"
) -> tuple[Path, dict[str, str], str, list[str]]:
    """(root, path -> label, description of the layout, what is left out and why)."""
    if not source.exists():
        raise UserError(f"{flag} {str(source)!r} does not exist; name a folder of images or a CSV manifest")
    if data_format == "auto":
        data_format = recognise(source)
    try:
        if data_format == "csv":
            notes: list[str] = []
            return source.parent, read_manifest(source, notes), "; ".join([MANIFEST, *notes]), []
        if data_format == "tar":
            labels, problems = tar_labels(source)
            problems += tar_parts(labels, source, flag)
            return tar_root(source), labels, "images in tar files", problems
        if data_format == "folders":
            labels, facts, problems = folder_labels(source, flag)
            return source, labels, "; ".join(["one folder for each class", *facts]), problems
        labels, facts, problems = flat_labels(source)
        layout = "labels in the file names (label.number.suffix)"
        return source, labels, "; ".join([layout, *facts]), problems
    except (OSError, csv.Error) as error:
        culprit, reason = getattr(error, "filename", source), getattr(error, "strerror", error)
        raise UserError(f"{culprit} cannot be read as --data_format {data_format}: {reason}") from error


def natural_key(text: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sorts "2" before "10"; different texts ("1", "01") have different keys."""
    parts = re.split(r"([0-9]+)", text)
    return [(0, int(part)) if part[0] in "0123456789" else (1, part) for part in parts if part], text


def _map_classes(val: ImageSet, class_names: tuple[str, ...], source: str) -> ImageSet:
    unknown = sorted(set(val.class_names) - set(class_names), key=natural_key)
    if unknown:
        check_known(unknown, class_names, source)
        hint = folder_of_classes(val.paths, class_names)
        raise UserError(
            f"--val_data {source} has classes that the training data do not: {', '.join(unknown)}; "
            f"known are {', '.join(class_names)}"
            + (f". They are in its folder {hint!r}: give that to --val-data" if hint else "")
        )
    index = np.array([class_names.index(name) for name in val.class_names], np.int64)
    return ImageSet(val.root, val.paths, index[val.labels], class_names, val.sha256)


def groups_of(images: ImageSet, near: dict[str, Near]) -> list[str]:
    """[N] Images of one group show the same picture; an image without copies is its own group."""
    return [near[sha256].group if sha256 in near else sha256 for sha256 in images.sha256]


def split(
    images: ImageSet, config: TrainConfig, near: dict[str, Near], notes: list[str]
) -> tuple[ImageSet, ImageSet]:
    """(train, val) by `val_fraction` or `folds`; copies and near duplicates stay together."""
    labels = images.labels.tolist()
    copies = len(images) - len(set(images.sha256))
    if copies:
        notes.append(f"{copies} images are copies of others; copies stay on one side of the split")
    groups = groups_of(images, near)
    alike = len(set(images.sha256)) - len(set(groups))
    if alike and labels_decide(groups, labels, near):
        notes.append(
            "warning: images that look the same often differ in their labels; only identical files stay on "
            "one side of the split"
        )
        groups = list(images.sha256)
    elif alike:
        notes.append(
            f"{alike} images are near duplicates of others (re-encoded, resized, a little brighter); they "
            "too stay on one side"
        )
    if config.folds:
        is_val = choose_fold(
            labels, groups, images.class_names, config.folds, config.fold, config.seed, notes
        )
    else:
        is_val = choose_validation(
            labels, groups, images.class_names, config.val_fraction, config.seed, notes
        )
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
    """n / (num_classes * n_c): their mean over the images is 1. Source: scikit-learn's "balanced"."""
    counts = Counter(images.labels.tolist())
    return [
        len(images) / (len(images.class_names) * max(1, counts[c])) for c in range(len(images.class_names))
    ]

"""Index a labelled data set and split it: three layouts in, arrays of paths and labels out."""

import csv
import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.preprocess import list_images
from train.config import TrainConfig
from train.manifest import read_manifest, read_soft_labels, soft_targets
from train.scan import scan

# The label is what stands before the running number: cat.0.jpg, american_bulldog_12.jpg
FLAT_NAME = re.compile(r"^(?P<label>.*[^\s._-])[\s._-]+\(?\d+\)?$", re.DOTALL)


@dataclass(frozen=True)
class ImageSet:
    """Labelled images; `labels[i]` is the index in `class_names` of `paths[i]`."""

    root: Path
    paths: list[str]
    """Relative to root (a manifest may name absolute ones)."""
    labels: NDArray[np.int64]
    """[N]"""
    class_names: tuple[str, ...]
    sha256: list[str]
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


def prepare_data(config: TrainConfig) -> Data:
    """Index, scan and split what `config` names.

    Raises:
        ValueError: nothing to train on, or too much of it unreadable; the message says what to do.
    """
    notes: list[str] = []
    cache = Path(config.output) / ".cache"
    train, bad = _readable(config.data, config.data_format, config.max_bad, cache, notes)
    if len(train.class_names) < 2:
        raise ValueError(
            f"{config.data} has the one class {train.class_names[0]!r}; a classifier needs two or more"
        )
    if config.val_data:
        val, bad_val = _readable(config.val_data, config.data_format, config.max_bad, cache, notes)
        bad |= bad_val
        val = _map_classes(val, train.class_names, config.val_data)
        shared = set(train.sha256) & set(val.sha256)
        if shared:
            notes.append(
                f"warning: {len(shared)} images of {config.val_data} are also in {config.data}: "
                "validation flatters the model"
            )
    else:
        train, val = split(train, config.val_fraction, config.seed, notes)
    return Data(train, val, bad, _digest(train, val), notes)


def _readable(
    source: str, data_format: str, max_bad: float, cache: Path, notes: list[str]
) -> tuple[ImageSet, dict[str, str]]:
    root, labels, layout, problems = find_labels(Path(source), data_format)
    soft = read_soft_labels(Path(source)) if Path(source).is_file() else {}
    paths = sorted(labels)
    notes.append(f"{source}: {len(paths)} images, {layout}")
    notes.extend(f"warning: {source}: {name!r}: {why}" for name, why in problems.items())
    result = scan(root, paths, cache)
    if len(result.bad) > max_bad * len(paths):
        first = "; ".join(f"{path!r}: {why}" for path, why in list(result.bad.items())[:3])
        raise ValueError(
            f"{len(result.bad)} of {len(paths)} images in {source} are unreadable, more than "
            f"--max_bad {max_bad:g} allows ({first}); remove them or raise --max_bad"
        )
    good = [path for path in paths if path in result.sha256]
    class_names = tuple(sorted(set(labels.values()), key=natural_key))
    for name in class_names:
        if not any(labels[path] == name for path in good):
            raise ValueError(f"class {name!r} in {source} has no readable image; remove or fill it")
    index = {name: i for i, name in enumerate(class_names)}
    image_set = ImageSet(
        root,
        good,
        np.array([index[labels[path]] for path in good], np.int64),
        class_names,
        [result.sha256[path] for path in good],
        soft_targets(good, labels, soft, class_names, source) if soft else None,
    )
    return image_set, {str(root / path): why for path, why in result.bad.items()}


def find_labels(source: Path, data_format: str) -> tuple[Path, dict[str, str], str, dict[str, str]]:
    """(root, path -> label, description of the layout, folders not entered -> why)."""
    if not source.exists():
        raise ValueError(
            f"--data {str(source)!r} does not exist; name a folder of images or a CSV manifest"
        )
    if data_format == "auto":
        data_format = _recognise(source)
    try:
        if data_format == "csv":
            return source.parent, read_manifest(source), "labels from a CSV manifest", {}
        if data_format == "folders":
            labels, problems = _folder_labels(source)
            return source, labels, "one folder for each class", problems
        return source, _flat_labels(source), "labels in the file names (label.number.suffix)", {}
    except (OSError, csv.Error) as error:
        culprit, reason = getattr(error, "filename", source), getattr(error, "strerror", error)
        raise ValueError(f"{culprit} cannot be read as --data_format {data_format}: {reason}") from error


def _recognise(source: Path) -> str:
    if source.is_file():
        return "csv"
    try:
        top = [p for p in list_images(source, recursive=False).paths if not p.startswith(".")]
    except PermissionError as error:
        raise ValueError(f"{source} cannot be read: permission denied") from error
    folders = [f for f in sorted(os.listdir(source)) if _is_class_folder(source / f)]
    if top and folders:
        raise ValueError(
            f"{source} holds both images ({top[0]!r}, ...) and folders ({folders[0]!r}, ...): say "
            "--data_format flat or --data_format folders"
        )
    if not top and not folders:
        raise ValueError(f"{source} holds no images and no class folders")
    return "folders" if folders else "flat"


def _is_class_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _flat_labels(root: Path) -> dict[str, str]:
    labels: dict[str, str] = {}
    for path in list_images(root, recursive=False).paths:
        if path.startswith("."):  # ._cat.0.jpg and other litter
            continue
        match = FLAT_NAME.match(os.path.splitext(path)[0])
        if match is None:
            raise ValueError(
                f"no label in the file name {path!r} in {root}: expected label.number.suffix as in "
                "cat.0.jpg; use a folder for each class or a CSV manifest (path,label)"
            )
        labels[path] = match["label"]
    if not labels:
        raise ValueError(f"no images in {root}")
    return labels


def _folder_labels(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    labels: dict[str, str] = {}
    problems: dict[str, str] = {}
    for folder in sorted(os.listdir(root)):
        if not _is_class_folder(root / folder):
            continue
        listing = list_images(root / folder)
        problems |= {f"{folder}/{name}": why for name, why in listing.problems.items()}
        # ._cat.0.jpg, .thumbnails/cat.0.jpg, .ipynb_checkpoints/ and other litter
        images = [p for p in listing.paths if not any(part.startswith(".") for part in p.split("/"))]
        if not images:
            raise ValueError(f"class folder {str(root / folder)!r} holds no images; remove it")
        labels |= {f"{folder}/{path}": folder for path in images}
    if not labels:
        raise ValueError(f"no class folders in {root}")
    return labels, problems


def natural_key(text: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sorts "2" before "10"; different texts ("1", "01") have different keys."""
    parts = re.split(r"([0-9]+)", text)
    return [(0, int(part)) if part[0] in "0123456789" else (1, part) for part in parts if part], text


def _map_classes(val: ImageSet, class_names: tuple[str, ...], source: str) -> ImageSet:
    unknown = sorted(set(val.class_names) - set(class_names), key=natural_key)
    if unknown:
        raise ValueError(
            f"--val_data {source} has classes that the training data do not: {', '.join(unknown)}; "
            f"known are {', '.join(class_names)}"
        )
    index = np.array([class_names.index(name) for name in val.class_names], np.int64)
    return ImageSet(val.root, val.paths, index[val.labels], class_names, val.sha256)


def split(images: ImageSet, fraction: float, seed: int, notes: list[str]) -> tuple[ImageSet, ImageSet]:
    """(train, val): about `fraction` of each class goes to val; a function of content and seed.

    Identical files stay together, and adding images moves few others. Every class keeps at least one
    image on the training side; one with a single distinct image has none to validate, and a file with
    two labels validates nothing.
    """
    groups: dict[str, list[int]] = {}
    for i, sha256 in enumerate(images.sha256):
        groups.setdefault(sha256, []).append(i)
    mixed = sum(len({int(images.labels[i]) for i in members}) > 1 for members in groups.values())
    copies = len(images) - len(groups)
    if copies:
        notes.append(f"{copies} images are copies of others; copies stay on one side of the split")
    if mixed:
        notes.append(f"warning: {mixed} images occur under more than one label: kept for training only")

    by_class: list[list[str]] = [[] for _ in images.class_names]
    for sha256, members in groups.items():
        if len({int(images.labels[i]) for i in members}) == 1:  # a contradiction validates nothing
            by_class[images.labels[members[0]]].append(sha256)
    chosen: list[int] = []
    for label, hashes in enumerate(by_class):
        hashes.sort(key=lambda h: hashlib.sha256(f"{seed}:{h}".encode()).digest())
        wanted = max(1, round(fraction * sum(len(groups[h]) for h in hashes)))
        taken = 0
        for sha256 in hashes[:-1]:  # the last one stays for training
            if taken >= wanted:
                break
            chosen.extend(groups[sha256])
            taken += len(groups[sha256])
        if not taken:
            notes.append(f"warning: class {images.class_names[label]!r} has no image to validate on")
    if not chosen:
        raise ValueError("no class has two different images: nothing is left to validate on")
    is_val = np.zeros(len(images), bool)
    is_val[chosen] = True
    return images.take(np.flatnonzero(~is_val)), images.take(np.flatnonzero(is_val))


def _digest(train: ImageSet, val: ImageSet) -> str:
    digest = hashlib.sha256(repr(train.class_names).encode())
    for images in (train, val):
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

"""CSV manifests: path, label, and for soft labels a column probability_CLASS for each class."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SOFT_COLUMN = "probability_"


def read_manifest(path: Path) -> dict[str, str]:
    """image -> label, from the columns path and label.

    Raises:
        ValueError: a column, path or label is missing, an image is listed twice, labels differ by white
            space alone, or a column `split` would have no effect.
    """
    labels: dict[str, str] = {}
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or ()
        if not {"path", "label"} <= set(columns):
            described = ", ".join(map(repr, columns))[:200] or "nothing in it"
            raise ValueError(
                f"{path} is read as a manifest: UTF-8, separated by commas, with the columns path,label in "
                f"its first line; it has {described}"
            )
        if "split" in columns:
            raise ValueError(
                f"{path} has a column split, which is not looked at: make it two manifests, one for --data "
                "and one for --val_data, without this column"
            )
        for row in reader:
            image, label = row["path"], row["label"]
            if not image or not label:
                raise ValueError(f"{path} line {reader.line_num}: path or label is empty")
            if image in labels:
                raise ValueError(f"{path} line {reader.line_num}: {image!r} is listed twice")
            labels[image] = label
    if not labels:
        raise ValueError(f"{path} lists no images")
    spellings: dict[str, str] = {}
    for label in dict.fromkeys(labels.values()):
        other = spellings.setdefault(label.strip(), label)
        if other != label:
            raise ValueError(f"{path}: the labels {other!r} and {label!r} differ by white space alone")
    return labels


def read_excluded(path: str) -> list[str]:
    """The column path of a CSV file, in order, without repetition; none if `path` is empty.

    Raises:
        ValueError: the file cannot be read, or has no such column.
    """
    if not path:
        return []
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            if "path" not in (reader.fieldnames or ()):
                raise ValueError(f"--exclude {path} needs the column path; it has {reader.fieldnames}")
            return list(dict.fromkeys(row["path"] for row in reader))
    except (OSError, csv.Error) as error:
        raise ValueError(f"--exclude {path} cannot be read: {error}") from error


def read_soft_labels(path: Path) -> dict[str, dict[str, float]]:
    """image -> class -> probability, from a manifest's columns probability_CLASS; images whose cells are
    empty have none."""
    soft: dict[str, dict[str, float]] = {}
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        columns = [name for name in reader.fieldnames or () if name.startswith(SOFT_COLUMN)]
        for row in reader:
            cells = {name.removeprefix(SOFT_COLUMN): row[name] for name in columns}
            if any(cells.values()):
                try:
                    soft[row["path"]] = {name: float(cell) for name, cell in cells.items()}
                except (TypeError, ValueError) as error:
                    raise ValueError(
                        f"{path} line {reader.line_num}: not a probability: {error}"
                    ) from error
    return soft


def soft_targets(
    paths: list[str],
    labels: dict[str, str],
    soft: dict[str, dict[str, float]],
    class_names: tuple[str, ...],
    source: str,
) -> NDArray[np.float32]:
    """[N, num_classes]; an image without probabilities has its label with certainty.

    Raises:
        ValueError: the columns are not of these classes, or a row is no distribution.
    """
    targets = np.zeros((len(paths), len(class_names)), np.float32)
    for i, path in enumerate(paths):
        if path not in soft:
            targets[i, class_names.index(labels[path])] = 1
            continue
        if set(soft[path]) != set(class_names):
            raise ValueError(
                f"{source} has the columns {SOFT_COLUMN}CLASS for {sorted(soft[path])}, its labels are "
                f"{sorted(class_names)}"
            )
        targets[i] = [soft[path][name] for name in class_names]
        if not (targets[i] >= 0).all() or abs(targets[i].sum() - 1) > 0.01:
            raise ValueError(
                f"{source}: the probabilities of {path!r}, {targets[i].tolist()}, do not sum to 1"
            )
    return targets


def write_manifest(
    path: Path,
    images: Sequence[str],
    labels: Sequence[str],
    soft: Mapping[str, NDArray[np.float64]] | None = None,
    class_names: Sequence[str] = (),
) -> None:
    """Atomically; `soft` has the probabilities, in the order of `class_names`, of some of the images."""
    soft = soft or {}
    columns = [SOFT_COLUMN + name for name in class_names] if soft else []
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(["path", "label", *columns])
        for image, label in zip(images, labels, strict=True):
            cells = [float(p) for p in soft[image]] if image in soft else ["" for _ in columns]
            writer.writerow([image, label, *cells])
    temporary.replace(path)

"""Pseudo-labels: a teacher's predictions for unlabelled images, and those that a student may use."""

import csv
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.record import verified_model
from pipelines.launch import run_program
from serve.contract.errors import UserError
from serve.contract.images import MAX_MEGAPIXELS, MOST_MEGAPIXELS
from train.checkpoint import best_checkpoint
from train.config import TrainConfig
from train.data.duplicates import NearDuplicate, labels_decide, near_duplicates
from train.data.index import Data, groups_of
from train.data.labels import listed
from train.data.layouts.soft_labels import SOFT_COLUMN
from train.data.scan import scan
from train.evaluation.predictions import read_predictions
from train.evaluation.significance import better_than_largest

FEW_ELSEWHERE = 0.25


@dataclass(frozen=True)
class PseudoLabels:
    """Predicted probabilities of unlabelled images."""

    paths: list[str]
    """Absolute."""
    probabilities: NDArray[np.float64]
    """[N, num_classes]"""
    class_names: tuple[str, ...]

    @property
    def labels(self) -> NDArray[np.int64]:
        values: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return values

    @property
    def names(self) -> list[str]:
        return [self.class_names[label] for label in self.labels]

    def take(self, indices: NDArray[np.int64]) -> "PseudoLabels":
        return PseudoLabels([self.paths[i] for i in indices], self.probabilities[indices], self.class_names)

    def counts(self) -> dict[str, int]:
        counts = Counter(self.names)
        return {name: counts[name] for name in self.class_names}


def check_skill(run: Path) -> None:
    """Raise UserError when a run is not surely better than always naming the largest class."""
    predictions = read_predictions(run)
    if not better_than_largest(predictions.correct, predictions.labels):
        raise UserError(
            f"the teacher {run} is not surely better than always naming the largest class: accuracy "
            f"{predictions.accuracy:.4f} on {len(predictions.paths)} validation images; train it longer, "
            "with --weights or on more images, or validate it on more"
        )


def score_folder(
    teacher: Path, images: Path, output: Path, max_megapixels: float = MAX_MEGAPIXELS
) -> PseudoLabels:
    """Return the predictions of the exported model for a folder; unreadable images are left out."""
    if not output.exists():
        model, unfinished = teacher / "export" / "model.onnx", output.with_name(f"unfinished-{output.name}")
        if not is_exported(teacher):
            run_program("export/main.py", "--run", teacher)
        # Ended by an outage, it leaves scores with gaps, which the next call fills.
        flags = ["--images", images, "--output", unfinished, "--max-megapixels", max_megapixels]
        run_program("serve/main.py", "--model", model, *flags, "--resume")
        unfinished.replace(output)
        unfinished.with_name(f"{unfinished.name}.json").unlink(missing_ok=True)
    return read_scores(output, images)


def is_exported(run: Path) -> bool:
    """Return whether the best checkpoint's model.onnx is there and verified.

    A new export would delete the quantised files beside it, its embeddings and its further verifications.
    """
    try:
        *_, checkpoint = verified_model(run, "fp32")
    except (ValueError, OSError):
        return False
    return checkpoint == best_checkpoint(run)


def read_scores(path: Path, images: Path) -> PseudoLabels:
    """Read serve/main.py's CSV without its rows of errors."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        names = [column for column in reader.fieldnames or () if column.startswith(SOFT_COLUMN)]
        rows = [row for row in reader if not row["error"]]
    return PseudoLabels(
        [str(images.resolve() / row["path"]) for row in rows],
        np.array([[float(row[name]) for name in names] for row in rows]).reshape(len(rows), len(names)),
        tuple(name.removeprefix(SOFT_COLUMN) for name in names),
    )


def without_labelled(found: PseudoLabels, data: Data, config: TrainConfig) -> PseudoLabels:
    """Drop images that show the same as a labelled one, also re-encoded or resized: no validation image may
    be trained on, and no label be contradicted.

    Raises:
        UserError: none is left.
    """
    cache = Path(config.output) / ".cache"
    sets, roots = (data.train, data.val), (data.train.root, data.val.root, Path("/"))
    labelled = [scan(images.root, images.paths, cache, config.max_megapixels) for images in sets]
    new = scan(Path("/"), found.paths, cache, MOST_MEGAPIXELS)  # scoring has accepted them
    known = {sha256 for result in labelled for sha256 in result.sha256.values()}
    near: dict[str, NearDuplicate] = {}
    if config.near_duplicates:
        scans = [*labelled, new]
        files = [root / path for root, result in zip(roots, scans, strict=True) for path in result.sha256]
        hashes = [sha256 for result in scans for sha256 in result.sha256.values()]
        near = near_duplicates(files, hashes, np.concatenate([result.thumbnails for result in scans]))
        labels = [label for images in sets for label in images.labels.tolist()]
        if labels_decide([group for images in sets for group in groups_of(images, near)], labels, near):
            near = {}  # in these data similar images often have different labels
    known_groups = {near[sha256].group for sha256 in known if sha256 in near}

    def is_new(path: str) -> bool:
        sha256 = new.sha256.get(path)  # None: it cannot be read any more
        if sha256 is None or sha256 in known:
            return False
        return sha256 not in near or near[sha256].group not in known_groups

    kept = np.flatnonzero([is_new(path) for path in found.paths])
    dropped = f"{len(found.paths) - len(kept)} of {len(found.paths)} unlabelled images"
    if not len(kept):
        raise UserError(f"{dropped} show the same as labelled ones; give --unlabelled other images")
    if len(kept) < len(found.paths):
        print(f"{dropped} are left out: they show the same as labelled ones, or are gone", flush=True)
    return found.take(kept)


def select(found: PseudoLabels, threshold: float, balance: bool) -> PseudoLabels:
    """Return the confident ones, the most confident first in each class.

    Raises:
        UserError: there are none, or some class has none and all are to have equally many.
    """
    confidence, labels = found.probabilities.max(axis=1), found.labels
    by_class = []
    for label in range(len(found.class_names)):
        members = np.flatnonzero((labels == label) & (confidence >= threshold))
        by_class.append(members[np.argsort(-confidence[members], kind="stable")])
    absent = [name for name, members in zip(found.class_names, by_class, strict=True) if not len(members)]
    if absent:
        missing = f"no unlabelled image is {listed(absent)} with a probability of --threshold {threshold:g}"
        if balance or len(absent) == len(by_class):
            raise UserError(
                f"{missing}: lower it, add such images to --unlabelled or train the teacher better"
                f"{', or leave out --balance' if balance else ''}"
            )
        print(f"warning: {missing}: the student has labelled ones only", file=sys.stderr)
    if balance:
        smallest = min(map(len, by_class))
        by_class = [members[:smallest] for members in by_class]
    return found.take(np.concatenate(by_class))


def warn_of_collapse(chosen: Mapping[str, int], labelled: Mapping[str, int]) -> list[str]:
    """Return a warning if more than FEW_ELSEWHERE of the pseudo-labels would have to be of other classes to
    be distributed as the labels are. `chosen` and `labelled`: class -> number of images, above 0 in all."""
    ours, theirs = sum(chosen.values()), sum(labelled.values())
    shares = {name: (chosen[name] / ours, labelled[name] / theirs) for name in chosen}
    excess = {name: share - usual for name, (share, usual) in shares.items()}
    if sum(max(0.0, value) for value in excess.values()) <= FEW_ELSEWHERE:
        return []
    most = max(excess, key=excess.__getitem__)
    return [
        f"warning: {shares[most][0]:.0%} of the pseudo-labels are {most!r}, of the labelled images "
        f"{shares[most][1]:.0%}: if --unlabelled is not so, train the teacher better, or give --balance"
    ]

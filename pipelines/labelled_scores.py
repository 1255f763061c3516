"""A labelled data set in any layout of training, and the answers of a served model to it."""

import hashlib
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.batch import default_batch_size, score
from serve.changes import SetDigest, digesting
from serve.contract.errors import UserError
from serve.contract.images import read_image_file
from serve.contract.urls import is_remote
from serve.inputs.inventory import Entry
from serve.predictor import Predictor
from serve.progress import Progress
from serve.summary import JobSummary
from train.config import TrainConfig
from train.data.download import copy
from train.data.index import natural_key
from train.data.labels import LabelledPaths, listed, spelling_hints, unify
from train.data.layouts.registry import find_labels

IMAGE_TIMEOUT = 60.0  # seconds, as in serve/main.py
HELD_OUT = "--val-data"  # the flag of training whose images are read in the same way


@dataclass(frozen=True)
class LabelledData:
    """Images whose labels the model knows."""

    found: LabelledPaths
    class_names: tuple[str, ...]
    """The model's, in the order of its logits."""
    ignored: Mapping[str, int]
    """Class that the model does not know -> number of images, which are left out."""


@dataclass(frozen=True)
class Scored:
    """A model's answers to the N images that could be read, N > 0."""

    data: LabelledData
    paths: list[str]
    """[N], as in the data set."""
    labels: NDArray[np.int64]
    """[N]"""
    probabilities: NDArray[np.float32]
    """[N, num_classes], as served."""
    bad: dict[str, str]
    """Image that could not be read -> why."""
    digest: str
    """sha256 of the names, labels and contents."""


def read_labelled(
    source: str, data_format: str, columns: str, class_names: tuple[str, ...], ignore_unknown: bool
) -> LabelledData:
    """Find the images and labels of --data, as training does those of --val-data: where a label file or
    equal names say which images are held out, these are taken. What training would print goes to stderr.

    Raises:
        UserError: there are none, or classes that the model does not know (unless `ignore_unknown`), or
            no others.
    """
    local = source
    if is_remote(source):
        cache = Path(TrainConfig.output) / ".cache"
        local = str(copy(source, cache, True, partial(print, file=sys.stderr, flush=True)))
    notes: list[str] = []
    try:
        found = find_labels(Path(local), data_format, HELD_OUT, columns)
    except UserError as error:
        raise UserError(str(error).replace(HELD_OUT, "--data")) from error
    found = replace(found, labels=unify(found.labels, source, notes))
    notes += [f"warning: {source}: {warning}" for warning in found.warnings]
    for line in (f"{source}: {len(found.labels)} images, {found.layout}", *notes):
        print(line.replace(HELD_OUT, "--data"), file=sys.stderr)
    counts = Counter(found.labels.values())
    unknown = {name: counts[name] for name in sorted(counts.keys() - set(class_names), key=natural_key)}
    if unknown and not ignore_unknown:
        raise UserError(_unknown_classes(source, unknown, class_names))
    labels = {path: label for path, label in found.labels.items() if label not in unknown}
    if not labels:
        raise UserError(
            f"--data {source} has no image of a class that the model knows: {listed(class_names)}"
        )
    return LabelledData(replace(found, labels=labels), class_names, unknown)


def _unknown_classes(source: str, unknown: Mapping[str, int], class_names: tuple[str, ...]) -> str:
    hints = "".join(spelling_hints(unknown, class_names))
    return (
        f"--data {source} has classes that the model does not know, {listed(unknown)} "
        f"({sum(unknown.values())} images); it knows {listed(class_names)}{hints}; --ignore-unknown leaves "
        "their images out"
    )


def score_labelled(
    predictor: Predictor, data: LabelledData, max_bad: float, max_megapixels: float
) -> Scored:
    """Score the images in the sorted order of their paths, as a scoring job does.

    Raises:
        UserError: a larger share than `max_bad` cannot be read, or all of them.
        OSError: some cannot be read for reasons that may pass.
    """
    labels, root = data.found.labels, data.found.root
    contents, progress, summary = SetDigest(), Progress(len(labels)), JobSummary(data.class_names)
    rows = score(
        predictor,
        map(Entry, sorted(labels)),
        digesting(lambda entry: read_image_file(root / entry.name), contents),
        default_batch_size(predictor),
        image_timeout=IMAGE_TIMEOUT,
        max_megapixels=max_megapixels,
    )
    paths, probabilities, bad = list[str](), list[NDArray[np.float32]](), dict[str, str]()
    with closing(rows):
        for row in rows:
            progress.add(row)
            summary.add(row)
            if row.probabilities is None:
                bad[row.path] = row.error
            else:
                paths.append(row.path)
                probabilities.append(row.probabilities)
    for line in progress.doubts.lines():
        print(f"warning: {line}", file=sys.stderr)
    first = "; ".join(f"{path!r}: {why}" for path, why in list(bad.items())[:3])
    if summary.is_outage:
        raise OSError(f"{summary.transient} of {len(labels)} images cannot be read now ({first})")
    if not paths or len(bad) > max_bad * len(labels):
        raise UserError(
            f"{len(bad)} of {len(labels)} images are unreadable, more than --max-bad {max_bad:g} allows "
            f"({first}): repair them, or raise --max-bad"
        )
    index = {name: i for i, name in enumerate(data.class_names)}
    own = np.array([index[labels[path]] for path in paths], np.int64)
    digest = hashlib.sha256(
        f"{sorted(labels.items())}{contents.hexdigest()}".encode(errors="surrogatepass")
    )
    return Scored(data, paths, own, np.stack(probabilities), bad, digest.hexdigest())

"""PyTorch against the served path, on real validation images from their bytes and on noise: a gate.

The PyTorch side takes weights, preprocessing and class names from the checkpoint. The served side takes
all three from the ONNX file, through the code that serves it. Whatever was damaged on the way shows.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.convert import split_head
from export.gate import (
    CONFIDENCE,
    LARGE_CHANGE,
    MAX_LARGELY_CHANGED,
    MAX_LOG_LOSS_ADDED,
    images_needed,
)
from serve.contract.errors import UserError
from serve.contract.images import load_image, read_image_file
from serve.contract.metadata import EMBEDDINGS_NAME, INPUT_NAME
from serve.contract.preprocess import Preprocess
from serve.predictor import Predictor
from serve.providers.session import ONNXRUNTIME_VERSION
from train.evaluation.significance import paired_interval
from train.models.classifier import ImageClassifier, probabilities

BATCH_SIZES = (1, 2, 7, 32)
NOISE_SEED = 0
MAX_PROBABILITY_DIFFERENCE = 1e-4
MAX_LOGIT_DIFFERENCE = 1e-3
"""Relative to 1 + the largest |logit|."""
MAX_ACCURACY_DRIFT = 0.005
"""Between the accuracy recorded in training (another device, another batch size) and PyTorch's here."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Limits:
    """How far the served answers may be from PyTorch's in float32."""

    probabilities: float = MAX_PROBABILITY_DIFFERENCE
    logits: float = MAX_LOGIT_DIFFERENCE
    accuracy_drop: float | None = None
    """Validation accuracy lost, as a share of images; unset: one image, gained or lost. With it come the
    limits of export/gate.py."""


def limits_for(model_precision: str, precision: str, max_accuracy_drop: float) -> Limits:
    """float32 throughout gives the trained answers themselves; rounded arithmetic is held to its accuracy.

    `max_accuracy_drop` is in points (percent of images).
    """
    if model_precision == precision == "fp32":
        return Limits()
    return Limits(math.inf, math.inf, max_accuracy_drop / 100)


@dataclass
class Verification:
    """Goes to verification.json."""

    passed: bool = False
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be decided."""
    num_images: int = 0
    num_noise_images: int = 0
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    file: str = "model.onnx"
    model_precision: str = "fp32"
    """Of the file's own layers: fp32, int8 or fp16."""
    provider: str = ""
    precision: str = "fp32"
    """Of the provider's arithmetic."""
    nodes: str = ""
    """How many of the graph's nodes the provider runs."""
    max_accuracy_drop: float | None = None
    """The limit, as a share of images; none for float32, which is held to its probabilities."""
    max_difference_logits: float = 0.0
    max_difference_probabilities: float = 0.0
    max_difference_validation: float = 0.0
    """Of probabilities, of validation images alone."""
    largely_changed: int = 0
    """Validation images with a probability that differs by more than LARGE_CHANGE."""
    max_difference_embeddings: float = 0.0
    """On noise; 0 too when the file has none."""
    argmax_agreement: float = 0.0
    """Share of images, noise included, with the same likeliest class."""
    validation_agreement: float = 0.0
    """The same of validation images alone."""
    accuracy_pytorch: float = 0.0
    accuracy_served: float = 0.0
    """By class name, as a user of the file reads it."""
    gained: int = 0
    """Validation images that only the served model has right."""
    lost: int = 0
    """Validation images that only PyTorch has right."""
    accuracy_trained: float = 0.0
    """As recorded when the checkpoint was written."""
    log_loss_pytorch: float = 0.0
    log_loss_served: float = 0.0
    onnxruntime: str = ONNXRUNTIME_VERSION
    conversion: dict[str, Any] = field(default_factory=dict)
    """How an int8 file was made."""
    images_per_second: dict[str, float] = field(default_factory=dict)
    """As in {"model.onnx openvino:bf16": 302.0}, timed in turn with cpu:fp32 of the same file."""
    checkpoint_sha256: str = ""
    model_sha256: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ValidationImages:
    root: Path
    paths: Sequence[str]
    labels: Sequence[str]
    """Class names."""
    is_whole_set: bool

    @classmethod
    def read(cls, predictions: Path, root: Path, limit: int = 0) -> "ValidationImages":
        """From a run's val_predictions.csv; `limit` takes that many, evenly spaced; 0 takes all."""
        try:
            with predictions.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = list(csv.DictReader(file))
        except OSError as error:
            raise UserError(f"{predictions} cannot be read: {error.strerror}") from error
        total = len(rows)
        if not rows or any(row.get("path") is None or row.get("label") is None for row in rows):
            raise UserError(f"{predictions} holds no validation images (columns path and label)")
        if limit < 0:
            raise UserError(f"--limit {limit} must be 0 or more")
        if limit and limit < total:
            rows = [rows[i] for i in np.linspace(0, total - 1, limit).round().astype(int)]
        _load(root / rows[0]["path"])  # before minutes of work
        return cls(root, [r["path"] for r in rows], [r["label"] for r in rows], len(rows) == total)


@dataclass
class _Answers:
    """Of both paths, on the same images; each array [N, num_classes]."""

    pytorch_logits: list[Floats] = field(default_factory=list)
    pytorch_probabilities: list[Floats] = field(default_factory=list)
    served_logits: list[Floats] = field(default_factory=list)
    served_probabilities: list[Floats] = field(default_factory=list)

    def stack(self) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
        """((logits, probabilities) of PyTorch, the same of the served model)"""

        def join(*parts: list[Floats]) -> tuple[Floats, Floats]:
            logits, probs = (np.concatenate(part) for part in parts)
            return logits, probs

        return (
            join(self.pytorch_logits, self.pytorch_probabilities),
            join(self.served_logits, self.served_probabilities),
        )


@torch.inference_mode()
def verify(
    model: ImageClassifier,
    checkpoint: dict[str, Any],
    onnx_file: Path,
    images: ValidationImages,
    provider: str = "cpu",
    precision: str = "fp32",
    limits: Limits = Limits(),
) -> Verification:
    """Never raises for a bad model file: every finding is in `failures`, and `passed` is the verdict.

    Raises:
        UserError: a validation image is gone or unreadable, so that nothing can be verified.
    """
    report = Verification(accuracy_trained=checkpoint["history"]["best"]["val/accuracy"])
    class_names = list(checkpoint["class_names"])
    preprocess = Preprocess.from_dict(checkpoint["preprocess"])
    clip = float(checkpoint["config"]["clip_probabilities"])
    report.provider, report.precision, report.max_accuracy_drop = provider, precision, limits.accuracy_drop
    try:
        predictor = Predictor(onnx_file, provider, precision=precision, allow_unverified=True)
    except ValueError as error:
        report.failures.append(str(error))
        return report
    report.model_precision, report.nodes = predictor.metadata.precision, predictor.share
    _check_metadata(report, predictor, class_names, preprocess)
    if predictor.metadata.preprocess.size != preprocess.size or predictor.num_classes != len(class_names):
        return report  # nothing left to compare

    real, noise = _Answers(), _Answers()
    for batch in _batches(images.paths):
        decoded = [_load(images.root / path) for path in batch]
        trained = np.stack([preprocess(image) for image in decoded])
        served = np.stack([predictor.preprocess(image) for image in decoded])
        _ask(real, model, clip, predictor, trained, served)
    random = np.random.default_rng(NOISE_SEED)
    for batch_size in BATCH_SIZES:
        pixels = random.integers(0, 256, (batch_size, preprocess.size, preprocess.size, 3), np.uint8)
        _ask(noise, model, clip, predictor, pixels, pixels)
    _compare(report, real, noise, limits)
    if EMBEDDINGS_NAME in (output.name for output in predictor.session.get_outputs()):
        _compare_embeddings(report, model, predictor, pixels, limits)
    _score(report, real, images, class_names, list(predictor.metadata.class_names))
    report.passed = not report.failures
    return report


def _check_metadata(
    report: Verification, predictor: Predictor, class_names: list[str], preprocess: Preprocess
) -> None:
    served = predictor.metadata
    if list(served.class_names) != class_names:
        report.failures.append(
            f"class names in the file are {list(served.class_names)}, the checkpoint's are {class_names}"
        )
    if served.preprocess != preprocess:
        report.failures.append(
            f"preprocessing in the file is {served.preprocess}, the checkpoint's is {preprocess}"
        )


def _batches(paths: Sequence[str]) -> Iterator[Sequence[str]]:
    """One batch of each size, then the rest in the largest."""
    start = 0
    for size in BATCH_SIZES:
        if batch := paths[start : start + size]:
            yield batch
        start += size
    for first in range(start, len(paths), BATCH_SIZES[-1]):
        yield paths[first : first + BATCH_SIZES[-1]]


def _load(path: Path) -> Any:
    try:
        return load_image(read_image_file(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"validation image {path} cannot be read, so nothing is verified: {error}"
        ) from error


def _ask(
    answers: _Answers,
    model: ImageClassifier,
    clip: float,
    predictor: Predictor,
    trained: NDArray[np.uint8],
    served: NDArray[np.uint8],
) -> None:
    pytorch = model(torch.from_numpy(trained))
    answers.pytorch_logits.append(pytorch.numpy())
    answers.pytorch_probabilities.append(probabilities(pytorch.double(), clip).numpy())
    served_logits, served_probabilities = predictor.run(served)
    answers.served_logits.append(served_logits)
    answers.served_probabilities.append(served_probabilities)


def _compare(report: Verification, real: _Answers, noise: _Answers, limits: Limits) -> None:
    joined = [
        [np.concatenate(parts) for parts in zip(*sides, strict=True)]
        for sides in zip(real.stack(), noise.stack(), strict=True)
    ]
    (pytorch, expected), (served_logits, served) = joined
    report.num_images = sum(len(part) for part in real.pytorch_logits)
    report.num_noise_images = sum(len(part) for part in noise.pytorch_logits)
    if not (np.isfinite(pytorch).all() and np.isfinite(served_logits).all() and np.isfinite(served).all()):
        report.failures.append("logits or probabilities are not finite")
        return
    report.max_difference_logits = float(np.abs(pytorch - served_logits).max())
    report.max_difference_probabilities = float(np.abs(expected - served).max())
    same = expected.argmax(1) == served.argmax(1)
    report.argmax_agreement = float(same.mean())
    top_two = np.sort(expected, axis=1)[:, -2:]
    tied = top_two[:, 1] - top_two[:, 0] <= 2 * limits.probabilities
    if report.max_difference_probabilities > limits.probabilities:
        report.failures.append(
            f"probabilities differ by up to {report.max_difference_probabilities:.3g}, "
            f"more than {limits.probabilities:g}"
        )
    logit_limit = limits.logits * (1 + float(np.abs(pytorch).max()))
    if report.max_difference_logits > logit_limit:
        report.failures.append(
            f"logits differ by up to {report.max_difference_logits:.3g}, more than {logit_limit:.3g}"
        )
    if not (same | tied).all():
        report.failures.append(
            f"{int((~(same | tied)).sum())} of {len(same)} images get another class from the served model"
        )


def _compare_embeddings(
    report: Verification,
    model: ImageClassifier,
    predictor: Predictor,
    pixels: NDArray[np.uint8],
    limits: Limits,
) -> None:
    body, _ = split_head(model, predictor.num_classes, predictor.metadata.preprocess.size)
    pytorch = body(torch.from_numpy(pixels)).numpy()
    served = predictor.session.run([EMBEDDINGS_NAME], {INPUT_NAME: pixels})[0]
    report.max_difference_embeddings = float(np.abs(pytorch - served).max())
    limit = limits.logits * (1 + float(np.abs(pytorch).max()))
    if not report.max_difference_embeddings <= limit:  # NaN is not, either
        report.failures.append(
            f"embeddings differ by up to {report.max_difference_embeddings:.3g}, more than {limit:.3g}"
        )


def _score(
    report: Verification,
    real: _Answers,
    images: ValidationImages,
    trained_names: list[str],
    served_names: list[str],
) -> None:
    """The validation metric through both paths, each with its own class names."""
    (_, pytorch), (_, served) = real.stack()
    if not (np.isfinite(pytorch).all() and np.isfinite(served).all()):
        return
    labels = list(images.labels)
    rows = np.arange(len(labels))

    def right(values: Floats, names: list[str]) -> NDArray[np.bool_]:
        return np.array([names[i] == label for i, label in zip(values.argmax(1), labels, strict=True)])

    def log_loss(values: Floats, names: list[str]) -> float:
        columns = [names.index(label) for label in labels]
        return float(-np.log(np.maximum(values[rows, columns], 1e-15)).mean())

    expected, got = right(pytorch, trained_names), right(served, served_names)
    report.accuracy_pytorch, report.accuracy_served = float(expected.mean()), float(got.mean())
    report.gained, report.lost = int((got & ~expected).sum()), int((expected & ~got).sum())
    changes = np.abs(pytorch - served).max(axis=1)
    report.max_difference_validation = float(changes.max())
    report.largely_changed = int((changes > LARGE_CHANGE).sum())
    report.log_loss_pytorch = log_loss(pytorch, trained_names)
    if set(served_names) == set(trained_names):
        report.log_loss_served = log_loss(served, served_names)
    report.validation_agreement = float((pytorch.argmax(1) == served.argmax(1)).mean())
    _check_accuracy(report, images)


def _check_accuracy(report: Verification, images: ValidationImages) -> None:
    total = len(images.labels)
    drop, limit = report.accuracy_pytorch - report.accuracy_served, report.max_accuracy_drop
    if limit is not None:
        _check_rounded(report, total, drop, limit)
    if limit is None and abs(drop) > 1 / total + 1e-9:
        report.failures.append(
            f"validation accuracy is {report.accuracy_served:.4f} served and "
            f"{report.accuracy_pytorch:.4f} in PyTorch"
        )
    drift = abs(report.accuracy_pytorch - report.accuracy_trained)
    if images.is_whole_set and drift > max(MAX_ACCURACY_DRIFT, 1.5 / total):
        report.failures.append(
            f"validation accuracy was {report.accuracy_trained:.4f} in training and is "
            f"{report.accuracy_pytorch:.4f} now: the validation images or a library changed"
        )


def _check_rounded(report: Verification, total: int, drop: float, limit: float) -> None:
    """Accuracy fails when more than the limit is lost and chance is ruled out, by the images that changed
    sides; a note says where there are too few to tell. The other limits show damage on few images, too."""
    _, low, high = paired_interval(report.gained, report.lost, total, CONFIDENCE)
    between = f"between {100 * low:+.2f} and {100 * high:+.2f} points"
    if drop > limit + 1e-9 and high < 0:
        report.failures.append(
            f"validation accuracy is {report.accuracy_served:.4f} served and {report.accuracy_pytorch:.4f} "
            f"in float32: {100 * drop:.2f} points lost, more than {100 * limit:g}, and not by chance: of "
            f"{total} images {report.lost} are lost and {report.gained} gained (a change {between})"
        )
    elif 0 < limit < -low:
        needed = images_needed(report.gained, report.lost, total, limit)
        report.notes.append(
            f"{total} validation images cannot rule out a loss of {100 * limit:g} points of accuracy: the "
            f"change lies {between}; that takes about {needed} images"
        )
    added = report.log_loss_served - report.log_loss_pytorch
    if added > MAX_LOG_LOSS_ADDED:  # at chance level, accuracy shows no damage
        report.failures.append(
            f"log loss is {report.log_loss_served:.4f} served and {report.log_loss_pytorch:.4f} in "
            f"float32: {added:.4f} more, over {MAX_LOG_LOSS_ADDED:g}"
        )
    if report.largely_changed > MAX_LARGELY_CHANGED * total:
        report.failures.append(
            f"probabilities of {report.largely_changed} of {total} validation images differ by more than "
            f"{LARGE_CHANGE:g}, by up to {report.max_difference_validation:.3f}: at most "
            f"{MAX_LARGELY_CHANGED:.1%} of the images may"
        )

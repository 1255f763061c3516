"""PyTorch against the served path, on real validation images from their bytes and on noise: a gate.

The PyTorch side takes weights, preprocessing and class names from the checkpoint. The served side takes
all three from the ONNX file, through the code that serves it. Whatever was damaged on the way shows.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from export.convert import split_head
from export.gate import FLOAT32, LARGE_CHANGE, Limits, check_accuracy
from export.report import BATCH_SIZES, Verification
from export.validation_images import ValidationImages
from serve.contract.confidence import fit_threshold
from serve.contract.looks import Looks, look_of
from serve.contract.metadata import EMBEDDINGS_NAME
from serve.contract.preprocess import Preprocess
from serve.contract.profile import ValidationProfile
from serve.contract.scaling import extent_of
from serve.predictor import Predictor
from train.models.classifier import ImageClassifier, probabilities

NOISE_SEED = 0
Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


class Answers(NamedTuple):
    """Each array [N, num_classes]."""

    logits: Floats
    probabilities: Floats

    @classmethod
    def join(cls, parts: Iterable[tuple[Floats, Floats]]) -> "Answers":
        return cls(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    @property
    def are_finite(self) -> bool:
        return bool(np.isfinite(self.logits).all() and np.isfinite(self.probabilities).all())


@torch.inference_mode()
def verify(
    model: ImageClassifier,
    checkpoint: dict[str, Any],
    onnx_file: Path,
    images: ValidationImages,
    provider: str = "cpu",
    precision: str = "fp32",
    limits: Limits = FLOAT32,
) -> Verification:
    """Compare the two. Never raises for a bad model file: every finding is in `failures`, and `passed` is
    the verdict.

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

    looks = Looks()
    real = _answer(model, clip, predictor, _real_pixels(images, preprocess, predictor, looks))
    noise_pixels = list(_noise(preprocess.size))
    noise = _answer(model, clip, predictor, ((pixels, pixels) for pixels in noise_pixels))
    report.num_images, report.num_noise_images = len(images.paths), len(noise[0].logits)
    _compare(report, real, noise, limits)
    if EMBEDDINGS_NAME in (output.name for output in predictor.session.get_outputs()):
        _compare_embeddings(report, model, predictor, noise_pixels[-1], limits)
    if all(answers.are_finite for answers in real):
        names = (class_names, list(predictor.metadata.class_names))
        _score(report, [answers.probabilities for answers in real], images.labels, *names)
        _profile(report, real[1].probabilities, images.labels, names[1], looks)
        check_accuracy(report, len(images.labels), images.is_whole_set)
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


def _real_pixels(
    images: ValidationImages, preprocess: Preprocess, predictor: Predictor, looks: Looks
) -> Iterator[tuple[Pixels, Pixels]]:
    """Yield batches for PyTorch and for the served model, each from its own preprocessing.

    Both decode as the file says, which `_check_metadata` compares with the checkpoint.
    """
    for batch in _batches(images.paths):
        decoded = [images.load(path, predictor.decode) for path in batch]
        served = np.stack([predictor.preprocess(image) for image in decoded])
        for image, pixels in zip(decoded, served, strict=True):
            looks.add(look_of(extent_of(image).size, pixels))
        yield np.stack([preprocess(image) for image in decoded]), served


def _batches(paths: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield one batch of each size, then the rest in the largest."""
    start = 0
    for size in BATCH_SIZES:
        if batch := paths[start : start + size]:
            yield batch
        start += size
    for first in range(start, len(paths), BATCH_SIZES[-1]):
        yield paths[first : first + BATCH_SIZES[-1]]


def _noise(size: int) -> Iterator[Pixels]:
    random = np.random.default_rng(NOISE_SEED)
    for batch_size in BATCH_SIZES:
        yield random.integers(0, 256, (batch_size, size, size, 3), np.uint8)


def _answer(
    model: ImageClassifier, clip: float, predictor: Predictor, batches: Iterable[tuple[Pixels, Pixels]]
) -> tuple[Answers, Answers]:
    """Return PyTorch's answers, and those of the served model."""
    pytorch, served = [], []
    for trained_pixels, served_pixels in batches:
        logits = model(torch.from_numpy(trained_pixels))
        pytorch.append((logits.numpy(), probabilities(logits.double(), clip).numpy()))
        served.append(predictor.run(served_pixels))
    return Answers.join(pytorch), Answers.join(served)


def _compare(
    report: Verification, real: tuple[Answers, Answers], noise: tuple[Answers, Answers], limits: Limits
) -> None:
    pytorch, served = (Answers.join(parts) for parts in zip(real, noise, strict=True))
    if not (pytorch.are_finite and served.are_finite):
        report.failures.append("logits or probabilities are not finite")
        return
    expected = pytorch.probabilities
    report.max_difference_logits = float(np.abs(pytorch.logits - served.logits).max())
    report.max_difference_probabilities = float(np.abs(expected - served.probabilities).max())
    same = expected.argmax(1) == served.probabilities.argmax(1)
    report.argmax_agreement = float(same.mean())
    top_two = np.sort(expected, axis=1)[:, -2:]
    tied = top_two[:, 1] - top_two[:, 0] <= 2 * limits.probabilities
    if report.max_difference_probabilities > limits.probabilities:
        report.failures.append(
            f"probabilities differ by up to {report.max_difference_probabilities:.3g}, "
            f"more than {limits.probabilities:g}"
        )
    logit_limit = limits.logits * (1 + float(np.abs(pytorch.logits).max()))
    if report.max_difference_logits > logit_limit:
        report.failures.append(
            f"logits differ by up to {report.max_difference_logits:.3g}, more than {logit_limit:.3g}"
        )
    if not (same | tied).all():
        report.failures.append(
            f"{int((~(same | tied)).sum())} of {len(same)} images get another class from the served model"
        )


def _compare_embeddings(
    report: Verification, model: ImageClassifier, predictor: Predictor, pixels: Pixels, limits: Limits
) -> None:
    body, _ = split_head(model, predictor.num_classes, predictor.metadata.preprocess.size)
    pytorch = body(torch.from_numpy(pixels)).numpy()
    served = predictor.outputs([EMBEDDINGS_NAME], pixels)[0]
    report.max_difference_embeddings = float(np.abs(pytorch - served).max())
    limit = limits.logits * (1 + float(np.abs(pytorch).max()))
    if not report.max_difference_embeddings <= limit:  # NaN is not, either
        report.failures.append(
            f"embeddings differ by up to {report.max_difference_embeddings:.3g}, more than {limit:.3g}"
        )


def _profile(
    report: Verification, served: Floats, labels: Sequence[str], names: list[str], looks: Looks
) -> None:
    """Keep what scoring compares its answers with, from the served probabilities [N, num_classes]."""
    guesses = [names[i] for i in served.argmax(1)]
    right = np.array([guess == label for guess, label in zip(guesses, labels, strict=True)])
    threshold = fit_threshold(served.max(axis=1), right)
    profile = ValidationProfile(threshold, dict(Counter(labels)), dict(Counter(guesses)), looks)
    report.threshold, report.validation = asdict(threshold), profile.to_dict()


def _score(
    report: Verification,
    answers: Sequence[Floats],
    labels: Sequence[str],
    trained_names: list[str],
    served_names: list[str],
) -> None:
    """Compute the validation metrics through both paths, each with its own class names.

    `answers` are PyTorch's probabilities [N, num_classes] of the validation images, and those served.
    """
    pytorch, served = answers
    rows = np.arange(len(labels))

    def right(values: Floats, names: list[str]) -> NDArray[np.bool_]:
        return np.array([names[i] == label for i, label in zip(values.argmax(1), labels, strict=True)])

    def log_loss(values: Floats, names: list[str]) -> float:
        positions = {name: i for i, name in enumerate(names)}
        columns = [positions[label] for label in labels]
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

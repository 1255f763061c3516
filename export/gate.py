"""The limits that a model file must keep to be published, and what a number of images can show."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from scipy.stats import norm

from export.report import Verification
from train.evaluation.significance import Interval, paired_interval

MAX_PROBABILITY_DIFFERENCE = 1e-4
MAX_LOGIT_DIFFERENCE = 1e-3
"""Relative to 1 + the largest |logit|."""
MAX_ACCURACY_DRIFT = 0.005
"""Between the accuracy recorded in training (another device, another batch size) and PyTorch's now."""
MAX_LOG_LOSS_ADDED = 0.02
LARGE_CHANGE = 0.25
"""Of an image's probabilities."""
MAX_ACCURACY_DROP = 0.3
"""Points (percent of the images), unless --max-accuracy-drop is given."""
MAX_LARGELY_CHANGED = 0.005
"""Share of the validation images; of fewer than 200 none. Of 2,000 photographs in int8 it was 0 with an
EfficientNet-Lite0, and 0.0015 with a MobileNetV3-Small that was hardly better than chance."""
CONFIDENCE = 0.90  # of the interval of the change of accuracy: each end is surpassed with 5 %


@dataclass(frozen=True)
class Limits:
    """How far the served answers may be from PyTorch's in float32."""

    probabilities: float = MAX_PROBABILITY_DIFFERENCE
    logits: float = MAX_LOGIT_DIFFERENCE
    accuracy_drop: float | None = None
    """Validation accuracy lost, as a share of images; unset: one image, gained or lost."""


FLOAT32 = Limits()


def limits_for(model_precision: str, precision: str, max_accuracy_drop: float) -> Limits:
    """Hold float32 throughout to the trained answers themselves, and rounded arithmetic to its accuracy.

    `max_accuracy_drop` is in points (percent of images).
    """
    if model_precision == precision == "fp32":
        return FLOAT32
    return Limits(math.inf, math.inf, max_accuracy_drop / 100)


def check_accuracy(report: Verification, total: int, is_whole_set: bool) -> None:
    """Add to the report failures, where accuracy on `total` validation images is lost, and notes, where
    they are too few to show it."""
    limit = report.max_accuracy_drop
    if limit is not None:
        change = paired_interval(report.gained, report.lost, total, CONFIDENCE)
        drop = report.accuracy_pytorch - report.accuracy_served
        if drop > limit + 1e-9 and change.high < 0:
            report.failures.append(
                f"validation accuracy is {report.accuracy_served:.4f} served and "
                f"{report.accuracy_pytorch:.4f} in float32: {100 * drop:.2f} points lost, more than "
                f"{100 * limit:g}, and not by chance: of {total} images {report.lost} are lost and "
                f"{report.gained} gained (a change between {100 * change.low:+.2f} and "
                f"{100 * change.high:+.2f} points)"
            )
        elif 0 < limit < -change.low:
            report.notes.append(_too_few_images(report, total, limit, change))
        report.failures += _rounding_failures(report, total)
    elif abs(report.accuracy_pytorch - report.accuracy_served) > 1 / total + 1e-9:
        report.failures.append(
            f"validation accuracy is {report.accuracy_served:.4f} served and "
            f"{report.accuracy_pytorch:.4f} in PyTorch"
        )
    drift = abs(report.accuracy_pytorch - report.accuracy_trained)
    if is_whole_set and drift > max(MAX_ACCURACY_DRIFT, 1.5 / total):
        report.failures.append(
            f"validation accuracy was {report.accuracy_trained:.4f} in training and is "
            f"{report.accuracy_pytorch:.4f} now: the validation images or a library changed"
        )


def _rounding_failures(report: Verification, total: int) -> Iterator[str]:
    """Yield what shows damage on few images, too, where a loss of accuracy may be chance."""
    added = report.log_loss_served - report.log_loss_pytorch
    if added > MAX_LOG_LOSS_ADDED:  # at chance level, accuracy shows no damage
        yield (
            f"log loss is {report.log_loss_served:.4f} served and {report.log_loss_pytorch:.4f} in "
            f"float32: {added:.4f} more, over {MAX_LOG_LOSS_ADDED:g}"
        )
    if report.largely_changed > MAX_LARGELY_CHANGED * total:
        yield (
            f"probabilities of {report.largely_changed} of {total} validation images differ by more than "
            f"{LARGE_CHANGE:g}, by up to {report.max_difference_validation:.3f}: at most "
            f"{MAX_LARGELY_CHANGED:.1%} of the images may"
        )


def _too_few_images(report: Verification, total: int, limit: float, change: Interval) -> str:
    needed = images_needed(report.gained, report.lost, total, limit)
    return (
        f"{total} validation images cannot rule out a loss of {100 * limit:g} points of accuracy: the "
        f"change lies between {100 * change.low:+.2f} and {100 * change.high:+.2f} points"
        # as many gained as lost is assumed: with a loss among them it may be fewer than there are
        + (f"; that takes about {needed} images" if needed > total else "")
    )


def images_needed(gained: int, lost: int, n: int, limit: float) -> int:
    """Return about how many images rule out a loss of `limit` (a share of images), if as many are gained as
    lost and as large a share changes sides as of these n."""
    z = float(norm.ppf((1 + CONFIDENCE) / 2))
    return math.ceil(z * z * (1 / limit + (gained + lost) / n / limit**2))

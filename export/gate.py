"""Limits of what arithmetic below float32 may change, and the images that they need."""

from math import ceil

from scipy.stats import norm

MAX_LOG_LOSS_ADDED = 0.02
LARGE_CHANGE = 0.25
"""Of an image's probabilities."""
MAX_LARGELY_CHANGED = 0.005
"""Share of the validation images; of fewer than 200 none. Of 2,000 photographs in int8 it was 0 with an
EfficientNet-Lite0, and 0.0015 with a MobileNetV3-Small that was hardly better than chance."""
CONFIDENCE = 0.90  # of the interval of the change of accuracy: each end is surpassed with 5 %


def images_needed(gained: int, lost: int, n: int, limit: float) -> int:
    """Return about how many images rule out a loss of `limit` (a share of images), if as many are gained as
    lost and as large a share changes sides as of these n."""
    z = float(norm.ppf((1 + CONFIDENCE) / 2))
    return ceil(z * z * (1 / limit + (gained + lost) / n / limit**2))

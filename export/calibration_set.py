"""Real training images for calibration: what the network saw, and nothing that it is verified on."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.validation_images import ValidationImages
from serve.contract.errors import UserError
from serve.contract.images import load_image, read_image_file
from serve.contract.preprocess import Preprocess
from train.data.layouts.label_file import read_excluded
from train.data.layouts.registry import find_labels

SEED = 0
MIN_IMAGES = 8


def training_pixels(
    checkpoint: dict[str, Any], validation: ValidationImages, count: int, source: Path | None = None
) -> NDArray[np.uint8]:
    """Return `count` training images (or all, if fewer), by a fixed seed: uint8 [N, size, size, 3].

    Files with the bytes of a validation image are never taken, under any name. Unreadable ones are
    passed over, as training did.

    Raises:
        UserError: the training images are not where they were, or hardly any are left.
    """
    preprocess = Preprocess.from_dict(checkpoint["preprocess"])
    config, flag = checkpoint["config"], "--training-images" if source else "--data"
    source = source or Path(config["data"])
    paths = _list(source, flag, config)
    held_back = {hashlib.sha256(read_image_file(validation.root / p)).digest() for p in validation.paths}
    taken: list[NDArray[np.uint8]] = []
    for i in np.random.default_rng(SEED).permutation(len(paths)):
        if len(taken) == count:
            break
        try:
            data = read_image_file(paths[i])
            if hashlib.sha256(data).digest() not in held_back:
                taken.append(
                    preprocess(load_image(data, preprocess.decode, max_megapixels=config["max_megapixels"]))
                )
        except (OSError, ValueError):
            continue
    if len(taken) < MIN_IMAGES:
        raise UserError(
            f"{str(source)!r} has {len(taken)} readable images that are not validation images, and "
            f"calibration needs {MIN_IMAGES} or more: give others with --training-images"
        )
    return np.stack(taken)


def _list(source: Path, flag: str, config: dict[str, Any]) -> list[Path]:
    """Return the labelled images that training found in `source`, by the settings of the run."""
    if not source.exists():
        raise UserError(
            f"the training images {str(source)!r} do not exist; start from the folder that training was "
            "started in, or name them with --training-images"
        )
    found = find_labels(source, config["data_format"], flag, config["columns"])
    paths = found.labels.keys() - set(read_excluded(config["exclude"]))
    return [found.root / path for path in sorted(paths)]

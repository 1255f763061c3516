"""Real training images for calibration: what the network saw, and nothing that it is verified on."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.validation_images import ValidationImages
from serve.contract.archive import SUFFIX, list_tars, member_names
from serve.contract.errors import UserError
from serve.contract.images import MAX_MEGAPIXELS, load_image, read_image_file
from serve.contract.listing import has_image_suffix, list_images
from serve.contract.preprocess import Preprocess
from serve.contract.tables import split_names
from serve.inputs.lists import listed_in_csv

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
    source = source or Path(checkpoint["config"]["data"])
    limit = checkpoint["config"].get("max_megapixels", MAX_MEGAPIXELS)  # none in older ones
    column, *_ = split_names(checkpoint["config"].get("columns", "")) or [""]
    paths = _list(source, column)
    held_back = {hashlib.sha256(read_image_file(validation.root / p)).digest() for p in validation.paths}
    taken: list[NDArray[np.uint8]] = []
    for i in np.random.default_rng(SEED).permutation(len(paths)):
        if len(taken) == count:
            break
        try:
            data = read_image_file(paths[i])
            if hashlib.sha256(data).digest() not in held_back:
                taken.append(preprocess(load_image(data, preprocess.decode, max_megapixels=limit)))
        except (OSError, ValueError):
            continue
    if len(taken) < MIN_IMAGES:
        raise UserError(
            f"only {len(taken)} readable images in {str(source)!r} that are not validation images; "
            f"calibration needs {MIN_IMAGES} or more"
        )
    return np.stack(taken)


def _list(source: Path, column: str) -> list[Path]:
    """Return the images; `column` is that of their names in a label file, "" for the one that is found."""
    if not source.exists():
        raise UserError(
            f"the training images {str(source)!r} do not exist; start from the folder that training was "
            "started in, or name them with --training-images"
        )
    if source.is_file() and source.suffix != SUFFIX:
        return sorted({source.parent / path for path in listed_in_csv(str(source), "train", column)})
    for recursive in (False, True) if source.is_dir() else ():  # the second is a folder for each class
        if images := list(_visible(list_images(source, recursive).paths)):
            return [source / path for path in images]
    return [tar / name for tar in list_tars(source) for name in _photographs(_visible(member_names(tar)))]


def _photographs(names: Iterable[str]) -> list[str]:
    """Return the images; of labelled samples, as training does, KEY.jpg without its mask KEY.seg.png."""
    members = list(names)
    images = [name for name in members if has_image_suffix(name)]
    if not any(name.endswith(".cls") for name in members):
        return images
    keys = {image.rpartition(".")[0] for image in images}
    return [image for image in images if image.rpartition(".")[0].rpartition(".")[0] not in keys]


def _visible(paths: Iterable[str]) -> Iterator[str]:
    """Yield paths as training does: no ._cat.0.jpg, .thumbnails/cat.0.jpg and other litter."""
    return (path for path in paths if not any(part.startswith(".") for part in path.split("/")))

"""The images that a run was validated on, as export verifies with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from serve.contract.errors import UserError
from serve.contract.files import cache_folder
from serve.contract.images import Decode, load_accepted, load_whole
from serve.contract.urls import is_remote
from train.data.download import copy
from train.evaluation.predictions import read_labels


@dataclass(frozen=True)
class ValidationImages:
    root: Path
    paths: Sequence[str]
    labels: Sequence[str]
    """Class names."""
    is_whole_set: bool

    @classmethod
    def of_run(cls, run: Path, checkpoint: dict[str, Any], given: str = "", limit: int = 0) -> Self:
        """Read those of a run directory.

        Args:
            given: folder of the images, or URL of the data set, if they are not where training read them.
            limit: how many to take, evenly spaced; 0: all.

        Raises:
            UserError: there are none, the URL cannot be copied, or the first image is gone, so that minutes
                of work would fail.
        """
        root = Path(given or checkpoint["val_root"])
        if is_remote(given):
            root = _copy_of(given, Path(checkpoint["val_root"]))
        paths, labels = read_labels(run)
        total = len(paths)
        if limit and limit < total:
            chosen = np.linspace(0, total - 1, limit).round().astype(int)
            paths, labels = [paths[i] for i in chosen], [labels[i] for i in chosen]
        images = cls(root, paths, labels, len(paths) == total)
        images.load(images.paths[0])
        return images

    def load(self, path: str, decode: Decode = load_whole) -> Image.Image:
        """Return an image; `decode` as in `load_image`. Raises UserError when it is gone or unreadable."""
        try:
            return load_accepted(self.root / path, decode)
        except (OSError, ValueError) as error:
            raise UserError(
                f"validation image {self.root / path} cannot be read, so nothing is verified ({error}); "
                "where the images were moved, give their folder with --images"
            ) from error


def _copy_of(url: str, trained_root: Path) -> Path:
    """Return a local copy of the images at a URL: of the data set that was trained on, perhaps on another
    machine, the folder in it that training validated on."""
    copied = copy(url, cache_folder("--images"), True, partial(print, flush=True))
    home = copied if copied.is_dir() else copied.parent  # of a tar file, whose members begin with its name
    parts = trained_root.parts
    below = parts[parts.index(home.name) + 1 :] if home.name in parts else ()
    return home.joinpath(*below)

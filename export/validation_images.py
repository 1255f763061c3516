"""The images that a run was validated on, as export verifies with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from serve.contract.errors import UserError
from serve.contract.images import Decode, load_accepted, load_whole
from train.evaluation.predictions import read_labels


@dataclass(frozen=True)
class ValidationImages:
    root: Path
    paths: Sequence[str]
    labels: Sequence[str]
    """Class names."""
    is_whole_set: bool

    @classmethod
    def of_run(
        cls, run: Path, checkpoint: dict[str, Any], root: Path | None = None, limit: int = 0
    ) -> Self:
        """Read those of a run directory.

        Args:
            root: where the images are now, if not where training read them.
            limit: how many to take, evenly spaced; 0: all.

        Raises:
            UserError: there are none, or the first one is gone, so that minutes of work would fail.
        """
        paths, labels = read_labels(run)
        total = len(paths)
        if limit and limit < total:
            chosen = np.linspace(0, total - 1, limit).round().astype(int)
            paths, labels = [paths[i] for i in chosen], [labels[i] for i in chosen]
        images = cls(root or Path(checkpoint["val_root"]), paths, labels, len(paths) == total)
        images.load(images.paths[0])
        return images

    def load(self, path: str, decode: Decode = load_whole) -> Image.Image:
        """Return an image; `decode` as in `load_image`. Raises UserError when it is gone or unreadable."""
        try:
            return load_accepted(self.root / path, decode)
        except (OSError, ValueError) as error:
            raise UserError(
                f"validation image {self.root / path} cannot be read, so nothing is verified: {error}"
            ) from error

"""The images that a run was validated on, as export verifies with them."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from serve.contract.errors import UserError
from serve.contract.images import load_accepted


@dataclass(frozen=True)
class ValidationImages:
    root: Path
    paths: Sequence[str]
    labels: Sequence[str]
    """Class names."""
    is_whole_set: bool

    @classmethod
    def read(cls, predictions: Path, root: Path, limit: int = 0) -> "ValidationImages":
        """Read a run's val_predictions.csv; `limit` takes that many, evenly spaced; 0 takes all.

        Raises:
            UserError: it holds no images, or the first one is gone, so that minutes of work would fail.
        """
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
        images = cls(root, [r["path"] for r in rows], [r["label"] for r in rows], len(rows) == total)
        images.load(images.paths[0])
        return images

    def load(self, path: str) -> Image.Image:
        """Raises UserError when the image is gone or unreadable, so that nothing can be verified."""
        try:
            return load_accepted(self.root / path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"validation image {self.root / path} cannot be read, so nothing is verified: {error}"
            ) from error

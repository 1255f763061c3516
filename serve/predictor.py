"""One ONNX file, one session: pixels in, probabilities out."""

import os
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contract.errors import UserError
from serve.contract.metadata import INPUT_NAME, LOGITS_NAME, PROBABILITIES_NAME
from serve.providers.base import Runtime
from serve.providers.session import open_session
from serve.verification import read_metadata

OUT_OF_MEMORY = re.compile(r"allocate memory|bad.alloc|out of ?memory|_alloc_failed", re.IGNORECASE)


class Predictor:
    """Scores batches of preprocessed pixels with an exported model.

    Everything it needs to know (class names, preprocessing) comes from the file's metadata.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        provider: str = "auto",
        threads: int = 0,
        precision: str = "fp32",
        *,
        device_id: int = 0,
        engine_cache: Path | None = None,
        allow_unverified: bool = False,
        workers: int = 1,
    ):
        """
        Args:
            model: an ONNX file written by export/main.py.
            provider, threads, precision, device_id, engine_cache, workers: those of `Runtime`.
            allow_unverified: take a provider and precision that this file was never verified with.

        Raises:
            UserError: not an exported model; or the provider asked for cannot be used, has no such
                precision, or was never verified with this file.
        """
        self.path = Path(model)
        runtime = Runtime(provider, precision, threads, device_id, engine_cache, workers)
        if not self.path.is_file():
            raise UserError(f"model {str(self.path)!r} does not exist or is not a file")
        self.metadata = read_metadata(self.path)
        opened = open_session(self.path, runtime, self.metadata, allow_unverified)
        self.session, self.provider, self.precision = opened.session, opened.provider, precision
        self.reason, self.share = opened.reason, opened.share
        self._check_interface()

    def _check_interface(self) -> None:
        """Raise UserError where the graph is not what its metadata say, or is of one batch size only."""
        size, floats = self.metadata.preprocess.size, ("tensor(float)", [self.num_classes])
        expected = {
            INPUT_NAME: ("tensor(uint8)", [size, size, 3]),
            LOGITS_NAME: floats,
            PROBABILITIES_NAME: floats,
        }
        found = {value.name: value for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        for name, (kind, shape) in expected.items():
            if name not in found:
                raise UserError(f"{self.path} has no {name}, only {', '.join(found)}")
            value = found[name]
            if (value.type, value.shape[1:]) != (kind, shape) or isinstance(value.shape[0], int):
                sizes = ", ".join(map(str, ["N", *shape]))
                raise UserError(
                    f"{self.path}: {name} {value.type} {value.shape} is not {kind} [{sizes}], as its "
                    "metadata say"
                )

    @property
    def num_classes(self) -> int:
        return len(self.metadata.class_names)

    def decode(self, image: Image.Image) -> Image.Image:
        """Read the pixels of an opened file, for `load_image`, as the model was validated."""
        return self.metadata.preprocess.decode(image)

    def preprocess(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return uint8 [size, size, 3] of an RGB image, as the model was validated."""
        return self.metadata.preprocess(image)

    def predict(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return probabilities, float32 [N, num_classes], of uint8 [N, size, size, 3]."""
        return self.run(pixels)[1]

    def run(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return (logits, probabilities), each float32 [N, num_classes], of uint8 [N, size, size, 3]."""
        logits, probabilities = self.outputs([LOGITS_NAME, PROBABILITIES_NAME], pixels)
        return logits, probabilities

    def outputs(self, names: list[str], pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """Return the outputs of these names of uint8 [N, size, size, 3].

        Raises:
            MemoryError: the provider has too little memory for so many images in one call.
        """
        try:
            outputs: list[NDArray[np.float32]] = self.session.run(names, {INPUT_NAME: pixels})
        except Exception as error:  # onnxruntime's own exception types share no public base
            if not OUT_OF_MEMORY.search(str(error)):
                raise
            raise MemoryError(
                f"{self.provider} has no memory for {len(pixels)} images in a call"
            ) from error
        return outputs

"""Classify images from Python: bytes or paths in, one answer for each out, the same as batch scoring's.

from serve import Classifier

classifier = Classifier("model.onnx")
for answer in classifier([jpeg_bytes, "photo.png"]):
    print(answer.label, answer.probability, answer.error)
"""

import os
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve import storage
from serve.batch import Turns, check_score, default_batch_size, score
from serve.contract.errors import UserError
from serve.contract.images import (
    MAX_MEGAPIXELS,
    check_file_size,
    check_megapixels,
    read_image_file,
)
from serve.contract.metadata import ModelMetadata
from serve.contract.urls import is_remote
from serve.inputs.inventory import Entry
from serve.local_copy import resolve_model
from serve.outputs.layout import Row
from serve.predictor import Predictor
from serve.processors import available_processors

Bytes = bytes | bytearray | memoryview
ImageSource = Bytes | str | os.PathLike[str]


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The outcome for one image: a label and its probabilities, or an error; what is absent is None."""

    label: str | None = None
    """The likeliest class."""
    probability: float | None = None
    """Of `label`, the same number as in predictions.csv."""
    probabilities: NDArray[np.float32] | None = None
    """float32 [num_classes], in the order of `Classifier.class_names`."""
    error: str | None = None
    """Why the image could not be read."""
    doubt: str | None = None
    """What looks wrong about the picture that was classified."""


class Classifier:
    """An exported model that takes images as bytes or paths. Several threads may call it at the same time.

    Answers are those of serve/main.py: the same pixels, errors and limits, and batches cut at the same
    positions of the list.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        provider: str = "auto",
        threads: int = 0,
        *,
        precision: str = "fp32",
        batch_size: int = 0,
        image_timeout: float = 60.0,
        max_megapixels: float = MAX_MEGAPIXELS,
        allow_unverified: bool = False,
    ):
        """
        Args:
            path: whatever --model of serve/main.py takes.
            provider: "cpu", "cuda", "tensorrt", "openvino", or "auto": the fastest that is installed and
                was verified with this file.
            threads: how many images are read, decoded and classified at the same time, over all calls; 0:
                one for each processor that this process may use. Workers of Spark or Ray give 1.
            precision: of the provider's arithmetic, "fp32", "tf32", "bf16" or "fp16".
            batch_size: images in a call of the model; 0: as serve/main.py chooses.
            image_timeout: seconds for reading and decoding one image, then it gets an error; 0: none.
            max_megapixels: millions of pixels above which an image gets an error.
            allow_unverified: take a provider and precision that this file was never verified with.

        Raises:
            UserError: not an exported model, a value outside its limits, or the provider cannot be used or
                was never verified with this file.
        """
        self._workers = threads or available_processors()
        with resolve_model(os.fspath(path)) as model:
            self._predictor = Predictor(
                model.path,
                provider,
                threads,
                precision,
                allow_unverified=allow_unverified,
                workers=self._workers,
            )
        self._batch_size = batch_size or default_batch_size(self._predictor)
        check_megapixels(max_megapixels)
        self._image_timeout, self._max_megapixels = image_timeout, max_megapixels
        check_score(self._predictor, self._batch_size, self._workers, image_timeout, embeddings=False)
        self._turns = Turns(self._predictor, self._workers)

    @property
    def metadata(self) -> ModelMetadata:
        """What the file says of itself: class names, preprocessing, provenance, verification."""
        return self._predictor.metadata

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.metadata.class_names

    @property
    def provider(self) -> str:
        """The provider in use, never "auto"."""
        return self._predictor.provider

    def __call__(self, images: Iterable[ImageSource]) -> list[Answer]:
        """Return an answer for each image, in order; one that cannot be read has an error.

        Args:
            images: each the bytes of an image file, or the path or URL of one.

        Raises:
            TypeError: one image in place of a list.
            MemoryError: the provider has too little memory for a batch.
            StorageHangsError: too many reads hang.
        """
        is_one = isinstance(images, Bytes | str | os.PathLike) or hasattr(images, "read")
        if is_one or getattr(images, "ndim", 1) != 1:  # an array's rows are no files
            raise TypeError(f"a list of image files is expected, not one {type(images).__name__}")
        images = list(images)
        return self.classify(len(images), lambda number: _read(images[number]))

    def classify(self, count: int, read: Callable[[int], bytes]) -> list[Answer]:
        """Return an answer for each of `count` images, whose bytes `read` returns by number.

        Args:
            read: called from several threads; what it raises is the error of this image.
        """
        workers = max(1, min(self._workers, -(-count // self._batch_size)))
        rows = score(
            self._predictor,
            (Entry(str(number)) for number in range(count)),
            lambda entry: read(int(entry.name)),
            self._batch_size,
            workers,
            self._image_timeout,
            turns=self._turns,
            max_megapixels=self._max_megapixels,
        )
        with closing(rows):
            return [self._answer(row) for row in rows]

    def _answer(self, row: Row) -> Answer:
        if row.probabilities is None:
            return Answer(error=row.error)
        likeliest = int(row.probabilities.argmax())
        # the shortest text of a float32, as predictions.csv has it: 0.9 and not 0.8999999761581421
        probability = float(str(row.probabilities[likeliest]))
        return Answer(self.class_names[likeliest], probability, row.probabilities, doubt=row.doubt or None)


def _read(image: ImageSource) -> bytes:
    if isinstance(image, Bytes):
        data = bytes(image)  # of bytes, no copy
        check_file_size(len(data))
        return data
    if isinstance(image, str) and is_remote(image):
        return storage.read_object(image)
    if isinstance(image, str | os.PathLike):
        return read_image_file(image)
    raise UserError(f"the bytes or the path of an image are expected, not {type(image).__name__}")

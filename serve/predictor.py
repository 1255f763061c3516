"""One ONNX file, one session: pixels in, probabilities out."""

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image

from serve.metadata import INPUT_NAME, LOGITS_NAME, PROBABILITIES_NAME, ModelMetadata

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Predictor:
    """Scores batches of preprocessed pixels with an exported model.

    Everything it needs to know (class names, preprocessing) comes from the file's metadata.
    """

    def __init__(self, model: str | os.PathLike[str], provider: str = "auto", threads: int = 0):
        """
        Args:
            model: an ONNX file written by export/main.py.
            provider: "cpu", "cuda", or "auto" (CUDA when a session really gets it, else the CPU).
            threads: inference threads; 0 means one for each processor this process may use.

        Raises:
            ValueError: not an exported model, or the provider asked for is not to be had.
        """
        self.path = Path(model)
        if not self.path.is_file():
            raise ValueError(f"model {str(self.path)!r} does not exist or is not a file")
        if provider not in ("auto", *PROVIDERS):
            known = ", ".join(("auto", *PROVIDERS))
            raise ValueError(f"provider {provider!r} is none of {known}")
        if threads < 0:
            raise ValueError(f"threads {threads} must be 0 (one a processor) or more")
        self.session, self.provider = _open_session(self.path, provider, threads)
        props = self.session.get_modelmeta().custom_metadata_map
        try:
            self.metadata = ModelMetadata.from_props(props)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        self._check_interface()

    def _check_interface(self) -> None:
        size = self.metadata.preprocess.size
        image = self.session.get_inputs()[0]
        if (
            image.name != INPUT_NAME
            or image.type != "tensor(uint8)"
            or image.shape[1:] != [size, size, 3]
            or isinstance(image.shape[0], int)  # exported for one batch size only
        ):
            raise ValueError(
                f"{self.path}: input {image.name} {image.type} {image.shape} is not "
                f"{INPUT_NAME} tensor(uint8) [N, {size}, {size}, 3] as its metadata say"
            )
        for output in self.session.get_outputs():
            if output.name in (LOGITS_NAME, PROBABILITIES_NAME) and output.shape[1:] != [self.num_classes]:
                raise ValueError(
                    f"{self.path}: output {output.name} {output.shape} is not [N, {self.num_classes}], "
                    "the number of class names in its metadata"
                )
        missing = {LOGITS_NAME, PROBABILITIES_NAME} - {o.name for o in self.session.get_outputs()}
        if missing:
            raise ValueError(f"{self.path}: outputs {sorted(missing)} are missing")

    @property
    def num_classes(self) -> int:
        return len(self.metadata.class_names)

    def preprocess(self, image: Image.Image) -> NDArray[np.uint8]:
        """RGB image -> uint8 [size, size, 3], as the model was validated."""
        return self.metadata.preprocess(image)

    def predict(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [N, size, size, 3] -> probabilities, float32 [N, num_classes]."""
        return self.run(pixels)[1]

    def run(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """uint8 [N, size, size, 3] -> (logits, probabilities), each float32 [N, num_classes]."""
        logits, probabilities = self.session.run([LOGITS_NAME, PROBABILITIES_NAME], {INPUT_NAME: pixels})
        return logits, probabilities


def _open_session(path: Path, provider: str, threads: int) -> tuple[ort.InferenceSession, str]:
    """The session, and the short name of the provider that it really has."""
    options = ort.SessionOptions()
    # onnxruntime would size its pool by the host's processors, not by those this process may use.
    options.intra_op_num_threads = threads or available_processors()
    options.log_severity_level = 3
    wanted = [provider]
    if provider == "auto":
        wanted = ["cuda", "cpu"] if _has_nvidia_driver() else ["cpu"]
    listed = ort.get_available_providers()
    names = [PROVIDERS[p] for p in wanted if PROVIDERS[p] in listed]
    try:
        session = ort.InferenceSession(path, options, providers=names or [PROVIDERS["cpu"]])
    except Exception as error:  # onnxruntime's own exception types share no public base
        raise ValueError(f"{path}: onnxruntime cannot load this model: {error}") from error
    # The GPU build lists CUDA on machines without one and falls back silently: ask the session.
    chosen = session.get_providers()[0]
    got = next(short for short, name in PROVIDERS.items() if name == chosen)
    if provider not in ("auto", got):
        raise ValueError(
            f"provider {provider!r} was asked for and the session got {got!r}: check the GPU driver and "
            "that onnxruntime-gpu matches its CUDA version, or use --provider cpu"
        )
    return session, got


def _has_nvidia_driver() -> bool:
    """Without one, onnxruntime would print errors before it falls back."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def available_processors() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

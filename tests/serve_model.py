"""For the tests of serve/: a tiny exported model made without torch, and files to score with it.

Its logits are the mean red, green and blue of the image, so every colour has its own probabilities, and
an answer that belongs to another file is seen.
"""

import hashlib
import importlib.util
import io
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image

from serve.contract.metadata import (
    EMBEDDINGS_NAME,
    INPUT_NAME,
    LOGITS_NAME,
    METADATA_KEY,
    PROBABILITIES_NAME,
    ModelMetadata,
    Pairing,
)
from serve.contract.preprocess import Preprocess
from serve.providers import openvino

SIZE = 8
CLASS_NAMES = ("red", "green", "blue")
SCALE = 51.0  # grey levels to one unit of a logit
Colour = tuple[int, int, int]
ON_CPU = Pairing("cpu", "fp32", 9, 1.0, 1.0, 0.0, "1.31.1")
METADATA = ModelMetadata(CLASS_NAMES, Preprocess("crop", SIZE, SIZE), verified=(ON_CPU,))


def build_model(
    path: Path,
    class_names: Sequence[str] = CLASS_NAMES,
    size: int = SIZE,
    *,
    metadata: str | None = None,
    num_outputs: int | None = None,
    batch: int | str = "batch",
    image_type: int = TensorProto.UINT8,
    outputs: Sequence[str] = (LOGITS_NAME, PROBABILITIES_NAME),
) -> Path:
    """Write the model; the keywords make it disagree with its metadata. `metadata=""`: it has none."""
    if metadata is None:
        metadata = ModelMetadata(
            tuple(class_names), Preprocess("crop", size, size), verified=(ON_CPU,)
        ).to_json()
    channels = num_outputs or len(class_names)
    weight = np.eye(3, channels, dtype=np.float32) / np.float32(SCALE)
    nodes = [
        helper.make_node("Cast", [INPUT_NAME], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], [EMBEDDINGS_NAME], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", [EMBEDDINGS_NAME, "weight"], [LOGITS_NAME]),
        helper.make_node("Softmax", [LOGITS_NAME], [PROBABILITIES_NAME], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "mean colour",
        [helper.make_tensor_value_info(INPUT_NAME, image_type, [batch, size, size, 3])],
        [
            helper.make_tensor_value_info(
                name, TensorProto.FLOAT, [batch, 3 if name == EMBEDDINGS_NAME else channels]
            )
            for name in outputs
        ],
        [helper.make_tensor("weight", TensorProto.FLOAT, weight.shape, weight.tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if metadata:
        helper.set_model_props(model, {METADATA_KEY: metadata})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def colour_of(number: int) -> Colour:
    """A different colour for each number below 192; its class is `number % 3`."""
    shade = 255 - number // 3
    values = [number % 40] * 3
    values[number % 3] = shade
    return values[0], values[1], values[2]


def logits_for(colour: Colour, num_classes: int = 3) -> NDArray[np.float64]:
    return (np.array(colour) / SCALE) @ np.eye(3, num_classes)


def probabilities_for(colour: Colour, num_classes: int = 3) -> NDArray[np.float64]:
    exponentials = np.exp(logits_for(colour, num_classes))
    return exponentials / exponentials.sum()


def solid(colour: Colour, size: tuple[int, int] = (20, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def lying_jpeg(width: int, height: int, file_format: str = "JPEG") -> bytes:
    """A JPEG of about 2 kB whose header claims another size."""
    pictures = {"save_all": True, "append_images": [noise(8, 8)]} if file_format == "MPO" else {}
    data = bytearray(encode(noise(32, 24), file_format, quality=90, **pictures))
    frame = data.index(b"\xff\xc0")  # marker, length, precision, height, width
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def png_header(width: int, height: int) -> bytes:
    """A PNG that is nothing but the claim to be of this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(b"\0"), b"IEND")
    body = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def broken_files() -> dict[str, tuple[bytes, str]]:
    """What cannot be scored: name -> (contents, a part of the error)."""
    jpeg, png = encode(noise(64, 48), "JPEG"), encode(noise(64, 48), "PNG")
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (png[: len(png) // 2], "truncated"),
        "damaged.png": (png[:2000] + bytes([png[2000] ^ 1]) + png[2001:], "broken data stream"),
        "empty.jpg": (b"", "empty file (0 bytes)"),
        "text.jpg": (b"I am not an image.\n", "not an image file of a known format"),
        "postscript.jpg": (encode(noise(4, 4), "EPS"), "not an image file of a known format"),
        "lying.jpg": (lying_jpeg(8000, 8000), "claims 8000x8000 pixels"),
        "huge.png": (png_header(100_000, 100_000), "100000x100000 pixels are over the limit"),
    }


@contextmanager
def open_descriptors_unchanged() -> Iterator[None]:
    """Those of earlier tests may be closed meanwhile, as their objects are collected."""
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert set(Path("/proc/self/fd").iterdir()) <= before


def record_verification(model: Path, *reports: tuple[str, bool, float], file: str = "model.onnx") -> None:
    """Write verification.json beside a model; a report as in ("openvino:bf16", True, 2.5): passed, and so
    many times as fast as the cpu at fp32."""
    entries = []
    for name, passed, speed in reports:
        provider, _, precision = name.partition(":")
        entries.append(
            {
                "file": file,
                "provider": provider,
                "precision": precision,
                "passed": passed,
                "num_images": 9,
                "accuracy_served": 1.0,
                "validation_agreement": 1.0,
                "max_difference_probabilities": 0.0,
                "onnxruntime": "1.31.1",
                "images_per_second": {f"{file} {name}": 10 * speed, f"{file} cpu:fp32": 10.0}
                if speed
                else {},
                "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
            }
        )
    record = {**entries[0], "pairings": entries[1:]}
    model.with_name("verification.json").write_text(json.dumps(record))


def model_verified_on(path: Path, *names: str) -> Path:
    """`names` as in "openvino:bf16"."""
    pairings = [replace(ON_CPU, provider=n.split(":")[0], precision=n.split(":")[1]) for n in names]
    metadata = ModelMetadata(
        ("red", "green", "blue"), Preprocess("crop", SIZE, SIZE), verified=(*pairings,)
    )
    return build_model(path / "model.onnx", metadata=metadata.to_json())


def openvino_devices() -> tuple[object, ...]:
    if importlib.util.find_spec("onnxruntime_ep_openvino") is None:
        pytest.skip("onnxruntime-ep-openvino is not installed")
    devices = openvino.openvino_devices()
    if not devices:
        pytest.skip("onnxruntime-ep-openvino does not take this processor")
    return devices

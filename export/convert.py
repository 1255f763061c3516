"""PyTorch -> one ONNX file that carries its metadata."""

import importlib.metadata
import io
import os
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from serve.metadata import INPUT_NAME, LOGITS_NAME, METADATA_KEY, PROBABILITIES_NAME, ModelMetadata
from serve.preprocess import Preprocess
from train.model import ImageClassifier, probabilities

VERSIONS_OF = ("torch", "torchvision", "timm", "onnx", "onnxscript", "numpy", "pillow")


class Scorer(nn.Module):
    """uint8 [N, H, W, 3] -> (logits, probabilities), each float32 [N, num_classes]."""

    def __init__(self, model: nn.Module, clip: float):
        super().__init__()
        self.model, self.clip = model, clip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.model(images)
        return logits, probabilities(logits, self.clip)


def describe(checkpoint: dict[str, Any], checkpoint_sha256: str) -> ModelMetadata:
    history = checkpoint["history"]
    return ModelMetadata(
        class_names=tuple(checkpoint["class_names"]),
        preprocess=Preprocess.from_dict(checkpoint["preprocess"]),
        model=checkpoint["config"]["model"],
        metrics=history["best"],
        temperature=float((checkpoint["ema"] or checkpoint["model"])["temperature"]),
        flip_tta=checkpoint["config"]["flip_tta"],
        clip_probabilities=checkpoint["config"]["clip_probabilities"],
        run_name=checkpoint["run_name"],
        run_id=checkpoint["run_id"],
        epoch=history["best_epoch"],
        data_digest=checkpoint["data_digest"],
        checkpoint_sha256=checkpoint_sha256,
        versions={name: importlib.metadata.version(name) for name in VERSIONS_OF},
    )


def convert(model: ImageClassifier, metadata: ModelMetadata, path: Path) -> None:
    """Write one self-contained ONNX file with a dynamic batch dimension. Mirror image, temperature and
    clipping are part of the graph.

    Raises:
        RuntimeError: the exporter cannot trace this network.
    """
    size = metadata.preprocess.size
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Scorer(model, metadata.clip_probabilities).eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT_NAME],
            output_names=[LOGITS_NAME, PROBABILITIES_NAME],
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {METADATA_KEY: metadata.to_json()})
    proto.producer_name = "purebred"
    onnx.checker.check_model(proto, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(proto.SerializeToString())
        file.flush()
        os.fsync(file.fileno())

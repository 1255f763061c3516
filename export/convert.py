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
from train.model import ImageClassifier, build_model

VERSIONS_OF = ("torch", "torchvision", "timm", "onnx", "onnxscript", "numpy", "pillow")


class Scorer(nn.Module):
    """uint8 [N, H, W, 3] -> (logits, probabilities), each float32 [N, num_classes]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.model(images)
        return logits, logits.softmax(dim=1)


def rebuild(checkpoint: dict[str, Any]) -> ImageClassifier:
    """The evaluated weights (the moving average if there is one) in eval mode, float32, on the CPU."""
    config = checkpoint["config"]
    model, _ = build_model(
        config["model"], len(checkpoint["class_names"]), config["image_size"], dropout=config["dropout"]
    )
    model.load_state_dict(checkpoint["ema"] or checkpoint["model"])
    return model.eval()


def describe(checkpoint: dict[str, Any], checkpoint_sha256: str) -> ModelMetadata:
    history = checkpoint["history"]
    return ModelMetadata(
        class_names=tuple(checkpoint["class_names"]),
        preprocess=Preprocess.from_dict(checkpoint["preprocess"]),
        model=checkpoint["config"]["model"],
        metrics=history["best"],
        run_name=checkpoint["run_name"],
        run_id=checkpoint["run_id"],
        epoch=history["best_epoch"],
        data_digest=checkpoint["data_digest"],
        checkpoint_sha256=checkpoint_sha256,
        versions={name: importlib.metadata.version(name) for name in VERSIONS_OF},
    )


def convert(model: ImageClassifier, metadata: ModelMetadata, path: Path) -> None:
    """Write one self-contained ONNX file with a dynamic batch dimension.

    Raises:
        RuntimeError: the exporter cannot trace this network.
    """
    size = metadata.preprocess.size
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Scorer(model).eval(),
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
    save(proto, metadata, path)


def save(proto: onnx.ModelProto, metadata: ModelMetadata, path: Path) -> None:
    """Check the graph and write it with its metadata: one file, whole or not at all."""
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {METADATA_KEY: metadata.to_json()})
    proto.producer_name = "purebred"
    onnx.checker.check_model(proto, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(proto.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metadata(path: Path) -> ModelMetadata:
    """Raises ValueError when the file is no exported model."""
    props = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    return ModelMetadata.from_props(props)


def write_metadata(path: Path, metadata: ModelMetadata) -> None:
    """Replace a file's metadata; its graph stays as it is."""
    save(onnx.load(path), metadata, path)

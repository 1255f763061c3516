"""PyTorch -> one ONNX file that carries its metadata."""

import copy
import importlib.metadata
import io
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.onnx.errors import OnnxExporterError

from serve.contract.command_line import command
from serve.contract.errors import UserError
from serve.contract.files import atomic_write
from serve.contract.heic import heic_version
from serve.contract.metadata import (
    EMBEDDINGS_NAME,
    INPUT_NAME,
    LOGITS_NAME,
    METADATA_KEY,
    PROBABILITIES_NAME,
    ModelMetadata,
)
from serve.contract.preprocess import Preprocess
from train.models.classifier import ImageClassifier, probabilities

VERSIONS_OF = ("torch", "torchvision", "timm", "onnx", "onnxscript", "numpy", "pillow")


class Scorer(nn.Module):
    """uint8 [N, H, W, 3] -> (logits, probabilities), each float32 [N, num_classes]."""

    def __init__(self, model: nn.Module, clip: float):
        super().__init__()
        self.model, self.clip = model, clip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.model(images)
        return logits, probabilities(logits, self.clip)


class EmbeddingScorer(nn.Module):
    """Also returns the embeddings, float32 [N, features]: the input of the last linear layer."""

    def __init__(self, model: ImageClassifier, num_classes: int, image_size: int, clip: float):
        super().__init__()
        self.body, self.head = split_head(model, num_classes, image_size)
        self.temperature, self.clip = float(model.temperature), clip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embeddings: Tensor = self.body(images)
        logits = self.head(embeddings) / self.temperature
        return logits, probabilities(logits, self.clip), embeddings


@torch.no_grad()
def split_head(
    model: ImageClassifier, num_classes: int, image_size: int
) -> tuple[ImageClassifier, nn.Linear]:
    """Return a copy of the model without its last linear layer, and that layer.

    Raises:
        UserError: the network does not end in a linear layer (SqueezeNet ends in a convolution).
    """
    images = torch.arange(2 * image_size**2 * 3).remainder(251).to(torch.uint8)
    images = images.view(2, image_size, image_size, 3)
    logits = model(images)
    for name, layer in reversed(list(model.named_modules())):
        if not isinstance(layer, nn.Linear) or layer.out_features != num_classes:
            continue
        body = copy.deepcopy(model)
        body.set_submodule(name, nn.Identity())
        body.temperature.fill_(1.0)
        if body.subject is not None:
            body.subject.keep_head(layer)
        embeddings = body(images)
        if embeddings.shape != (2, layer.in_features):
            continue
        if torch.allclose(layer(embeddings) / model.temperature, logits, rtol=1e-4, atol=1e-5):
            return body.eval(), layer
    raise UserError(
        "--embeddings: this network does not end in a linear layer, whose input they are; leave it out"
    )


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
        subject_crop=checkpoint["config"]["subject_crop"] if checkpoint.get("crops_subject") else "none",
        run_name=checkpoint["run_name"],
        run_id=checkpoint["run_id"],
        epoch=history["best_epoch"],
        data_digest=checkpoint["data_digest"],
        checkpoint_sha256=checkpoint_sha256,
        versions={name: importlib.metadata.version(name) for name in VERSIONS_OF} | heic_version(),
    )


def convert(model: ImageClassifier, metadata: ModelMetadata, path: Path, embeddings: bool = False) -> None:
    """Write one self-contained ONNX file with a dynamic batch dimension. Subject crop, mirror image,
    temperature and clipping are part of the graph.

    With `embeddings` it has them as a third output.

    Raises:
        UserError: the exporter cannot trace this network, or it has no embeddings.
    """
    size = metadata.preprocess.size
    clip = metadata.clip_probabilities
    scorer: nn.Module = Scorer(model, clip)
    if embeddings:
        scorer = EmbeddingScorer(model, len(metadata.class_names), size, clip)
    try:
        proto = to_graph(scorer, size)
    except UserError as error:
        raise UserError(
            f"{metadata.model}: {error}. The checkpoint is kept: another version of torch may export it; "
            f"{command('pipelines/doctor.py')} --model NAME tries it before training"
        ) from error
    save(proto, metadata, path)


def to_graph(scorer: nn.Module, size: int) -> onnx.ModelProto:
    """Return the ONNX graph of a Scorer or EmbeddingScorer that takes uint8 [N, size, size, 3], any N.

    Raises:
        UserError: the exporter cannot trace the network; the message is its reason.
    """
    outputs = [LOGITS_NAME, PROBABILITIES_NAME]
    if isinstance(scorer, EmbeddingScorer):
        outputs.append(EMBEDDINGS_NAME)
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                scorer.eval(),
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT_NAME],
                output_names=outputs,
                external_data=False,
                verbose=False,
            )
        except OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()
            why = reason[0] if reason else type(error.__cause__ or error).__name__
            raise UserError(f"torch {torch.__version__} cannot export this network ({why})") from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


def save(proto: onnx.ModelProto, metadata: ModelMetadata, path: Path) -> None:
    """Check the graph and write it with its metadata: one file, whole or not at all."""
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {METADATA_KEY: metadata.to_json()})
    proto.producer_name = "purebred"
    onnx.checker.check_model(proto, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(proto.SerializeToString())


def has_embeddings(path: Path) -> bool:
    return any(output.name == EMBEDDINGS_NAME for output in onnx.load(path).graph.output)

"""One self-contained ONNX file: uint8 pixels in, logits and probabilities out, any batch size."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.convert import convert, describe, rebuild
from serve.metadata import ModelMetadata
from serve.predictor import Predictor
from serve.preprocess import Preprocess
from train.config import TrainConfig
from train.model import build_model


def metadata(size: int, class_names: tuple[str, ...] = ("cat", "dog")) -> ModelMetadata:
    return ModelMetadata(class_names, Preprocess("squash", size, size))


@pytest.mark.parametrize(
    ("name", "size", "channels_last"),
    [
        ("simple_cnn", 50, False),
        ("resnet18", 64, False),
        ("resnet18", 64, True),
        ("mobilenet_v3_small", 64, False),
        ("googlenet", 64, False),
        ("alexnet", 96, False),
    ],
)
def test_served_answers_equal_pytorch(name: str, size: int, channels_last: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = build_model(name, 3, size)
    model.eval()
    model.channels_last = channels_last
    path = tmp_path / "model.onnx"
    convert(model, metadata(size, ("a", "b", "c")), path)
    predictor = Predictor(path, "cpu", allow_unverified=True)
    for batch_size in (1, 2, 7):
        pixels = np.random.default_rng(batch_size).integers(0, 256, (batch_size, size, size, 3), np.uint8)
        logits, probabilities = predictor.run(pixels)
        with torch.inference_mode():
            expected = model(torch.from_numpy(pixels))
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)
        np.testing.assert_allclose(probabilities, expected.softmax(1).numpy(), atol=1e-5)


def test_the_file_is_alone_and_says_what_it_is(tmp_path: Path) -> None:
    model, _ = build_model("simple_cnn", 2, 32)
    path = tmp_path / "model.onnx"
    convert(model.eval(), metadata(32), path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    proto = onnx.load(path, load_external_data=False)
    assert all(w.data_location == onnx.TensorProto.DEFAULT for w in proto.graph.initializer)
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param
    assert [d.dim_value for d in shape[1:]] == [32, 32, 3]
    assert Predictor(path, "cpu", allow_unverified=True).metadata == metadata(32)


def test_the_moving_average_is_what_is_exported() -> None:
    model, _ = build_model("simple_cnn", 2, 32)
    average = {k: torch.zeros_like(v) if k.endswith("weight") else v for k, v in model.state_dict().items()}
    checkpoint = {
        "config": TrainConfig(model="simple_cnn", image_size=32).to_dict(),
        "class_names": ["cat", "dog"],
        "model": model.state_dict(),
        "ema": average,
    }
    rebuilt = rebuild(checkpoint)
    assert not rebuilt.training
    assert rebuilt.network.classifier[3].weight.abs().sum() == 0
    assert rebuild({**checkpoint, "ema": None}).network.classifier[3].weight.abs().sum() > 0


def test_provenance_comes_from_the_checkpoint() -> None:
    checkpoint = {
        "config": {"model": "simple_cnn"},
        "class_names": ["cat", "dog"],
        "preprocess": Preprocess().to_dict(),
        "history": {"best": {"val/accuracy": 0.5}, "best_epoch": 3, "epochs_done": 4},
        "run_name": "name",
        "run_id": "id",
        "data_digest": "digest",
    }
    described = describe(checkpoint, "hash")
    assert described.epoch == 3
    assert described.metrics == {"val/accuracy": 0.5}
    assert (described.checkpoint_sha256, described.data_digest, described.run_id) == (
        "hash",
        "digest",
        "id",
    )
    assert "torch" in described.versions

"""One self-contained ONNX file: uint8 pixels in, logits and probabilities out, any batch size."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from detectors import detector as untrained_detector
from torch import Tensor, nn

from export.convert import convert, describe, split_head
from serve.contract.errors import UserError
from serve.contract.metadata import ModelMetadata
from serve.contract.preprocess import Preprocess
from serve.predictor import Predictor
from train.config import TrainConfig
from train.evaluation.calibration import log_probabilities
from train.models.build import build_model, rebuild
from train.models.classifier import ImageClassifier
from train.models.subject_crop.build import add_subject_crop


def metadata(size: int, class_names: tuple[str, ...] = ("cat", "dog")) -> ModelMetadata:
    return ModelMetadata(class_names, Preprocess("squash", size, size))


@pytest.mark.parametrize(
    ("name", "size", "channels_last"),
    [
        ("simple_cnn", 50, False),
        ("resnet18", 64, True),
        pytest.param("alexnet", 96, False, marks=pytest.mark.slow),
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


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("simple_cnn", 50, 256),
        ("resnet18", 64, 512),
        ("googlenet", 64, 1024),
        ("mobilenet_v3_small", 64, 1024),
        ("vit_tiny_patch16_224", 64, 192),
    ],
)
def test_embeddings_are_what_the_last_layer_sees(name: str, size: int, features: int) -> None:
    model, _ = build_model(name, 2, size)
    body, head = split_head(model.eval(), 2, size)
    seen: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8))
    with torch.inference_mode():
        logits, embeddings = model(pixels), body(pixels)
        assert embeddings.shape == (3, features)
        torch.testing.assert_close(embeddings, seen[0], rtol=0, atol=0)
        torch.testing.assert_close(head(embeddings), logits, rtol=0, atol=0)


def test_embeddings_are_a_third_output_and_change_no_other(tmp_path: Path) -> None:
    model, _ = build_model("simple_cnn", 2, 50)
    model.flip_tta = True
    model.temperature.fill_(0.5)
    convert(model.eval(), metadata(50), tmp_path / "model.onnx", embeddings=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 50, 50, 3), np.uint8)
    predictor = Predictor(tmp_path / "model.onnx", "cpu", allow_unverified=True)
    (embeddings,) = predictor.session.run(["embeddings"], {"images": pixels})
    with torch.inference_mode():
        body, _ = split_head(model, 2, 50)
        np.testing.assert_allclose(embeddings, body(torch.from_numpy(pixels)).numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            predictor.run(pixels)[0], model(torch.from_numpy(pixels)).numpy(), atol=1e-4
        )


def test_a_network_without_a_linear_head_has_no_embeddings(tmp_path: Path) -> None:
    model, _ = build_model("squeezenet1_1", 2, 64)
    with pytest.raises(ValueError, match="linear layer"):
        convert(model.eval(), metadata(64), tmp_path / "model.onnx", embeddings=True)


def test_a_network_that_torch_cannot_export_is_an_error_of_the_user(tmp_path: Path) -> None:
    class DataDependent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, : 2 + int(x.sum() > 1e9)]

    with pytest.raises(UserError, match=r"cannot export this network .* checkpoint is kept"):
        convert(ImageClassifier(DataDependent()).eval(), metadata(32), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_moving_average_is_what_is_exported() -> None:
    model, _ = build_model("simple_cnn", 2, 32)
    average = {k: torch.zeros_like(v) if k.endswith("weight") else v for k, v in model.state_dict().items()}
    checkpoint = {
        "config": TrainConfig(model="simple_cnn", image_size=32).to_dict(),
        "class_names": ["cat", "dog"],
        "preprocess": {"size": 32},
        "model": model.state_dict(),
        "ema": average,
    }
    rebuilt = rebuild(checkpoint)
    assert not rebuilt.training
    assert rebuilt.network.classifier[3].weight.abs().sum() == 0
    assert rebuild({**checkpoint, "ema": None}).network.classifier[3].weight.abs().sum() > 0


def test_provenance_comes_from_the_checkpoint() -> None:
    checkpoint = {
        "config": {
            "model": "simple_cnn",
            "flip_tta": True,
            "clip_probabilities": 0.01,
            "subject_crop": "cam",
        },
        "model": {"temperature": torch.tensor(9.0)},
        "ema": {"temperature": torch.tensor(1.5)},
        "class_names": ["cat", "dog"],
        "preprocess": Preprocess().to_dict(),
        "crops_subject": True,
        "history": {"best": {"val/accuracy": 0.5}, "best_epoch": 3, "epochs_done": 4},
        "run_name": "name",
        "run_id": "id",
        "data_digest": "digest",
    }
    described = describe(checkpoint, "hash")
    assert described.epoch == 3
    assert (described.temperature, described.flip_tta, described.clip_probabilities) == (1.5, True, 0.01)
    assert described.metrics == {"val/accuracy": 0.5}
    assert described.subject_crop == "cam"
    assert describe({**checkpoint, "crops_subject": False}, "hash").subject_crop == "none"
    assert (described.checkpoint_sha256, described.data_digest, described.run_id) == (
        "hash",
        "digest",
        "id",
    )
    assert "torch" in described.versions


def test_mirror_image_temperature_and_clipping_are_in_the_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = build_model("simple_cnn", 3, 32)
    model.eval()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
    with torch.inference_mode():
        plain, other = (model(torch.from_numpy(p)).numpy() for p in (pixels, mirrored))
    model.flip_tta = True
    model.temperature.fill_(0.01)
    path = tmp_path / "model.onnx"
    described = ModelMetadata(("a", "b", "c"), Preprocess("squash", 32, 32), clip_probabilities=0.05)
    convert(model, described, path)
    predictor = Predictor(path, "cpu", allow_unverified=True)
    logits, probabilities = predictor.run(pixels)
    np.testing.assert_allclose(logits, (plain + other) / 2 / 0.01, atol=1e-3)
    np.testing.assert_allclose(predictor.run(mirrored)[0], logits, atol=1e-3)
    expected = np.exp(log_probabilities(logits.astype(np.float64), 1.0, 0.05))
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    assert probabilities.min() >= 0.05


def cropping_model(kind: str, name: str, size: int, tmp_path: Path) -> tuple[ImageClassifier, int]:
    torch.manual_seed(0)
    model, _ = build_model(name, 3, size)
    detector = tmp_path / "detector.pt"
    if kind == "detector":
        torch.save(untrained_detector().state_dict(), detector)
    config = TrainConfig(
        model=name,
        image_size=size,
        subject_crop=kind,
        crop_detector=str(detector) if kind == "detector" else "",
        crop_min_score=0.0,
    )
    add_subject_crop(model, config.to_dict(), config.preprocess().size)
    for module in model.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of one batch, or untrained maps are flat
    model.train()(torch.randint(0, 256, (8, config.preprocess().size, config.preprocess().size, 3)))
    return model.eval(), config.preprocess().size


@pytest.mark.parametrize(
    ("kind", "name", "size"),
    [
        ("cam", "simple_cnn", 96),  # class activation
        # energy of a layer that is not the last
        pytest.param("cam", "resnet18", 64, marks=pytest.mark.slow),
        pytest.param("detector", "simple_cnn", 32, marks=pytest.mark.slow),
    ],
)
def test_the_subject_crop_is_in_the_graph(kind: str, name: str, size: int, tmp_path: Path) -> None:
    """Images of one bright square each on clutter: boxes differ, and answers from those of whole images."""
    model, side = cropping_model(kind, name, size, tmp_path)
    model.flip_tta = kind == "cam"
    random = np.random.default_rng(0)
    pixels = random.integers(0, 120, (8, side // 4, side // 4, 3), np.uint8)
    pixels = pixels.repeat(4, axis=1).repeat(4, axis=2)
    for image, (x, y) in zip(pixels, random.integers(0, side // 2, (8, 2)), strict=True):
        image[y : y + side // 3, x : x + side // 3] += 130
    path = tmp_path / "model.onnx"
    convert(model, metadata(side, ("a", "b", "c")), path)
    predictor = Predictor(path, "cpu", allow_unverified=True)
    for batch_size in (1, 3, 8):
        with torch.inference_mode():
            expected = model(torch.from_numpy(pixels[:batch_size])).numpy()
        spread = 1 + np.abs(expected).max()
        np.testing.assert_allclose(predictor.run(pixels[:batch_size])[0], expected, atol=1e-4 * spread)
    with torch.inference_mode():
        boxes = model.locate(torch.from_numpy(pixels)).numpy()
        assert model.subject is not None
        model.subject.active = False
        uncut = model(torch.from_numpy(pixels)).numpy()
    assert np.abs(boxes - boxes[0]).max() > 0.01
    assert np.abs(expected - uncut).max() > 1e-3 * spread


@pytest.mark.parametrize(("name", "size"), [("simple_cnn", 96), ("mobilenet_v3_small", 64)])
def test_embeddings_of_subjects_lead_to_the_same_logits(name: str, size: int, tmp_path: Path) -> None:
    """Of the average of crop and whole image, located with the head that embeddings do without."""
    model, side = cropping_model("cam", name, size, tmp_path)
    pixels = torch.randint(0, 256, (3, side, side, 3), dtype=torch.uint8)
    body, head = split_head(model, 3, side)
    with torch.inference_mode():
        torch.testing.assert_close(head(body(pixels)), model(pixels), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(body.locate(pixels), model.locate(pixels))

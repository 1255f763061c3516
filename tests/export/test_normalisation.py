"""Folding the normalisation is exact, borders and mirror images included, or not done."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from export.convert import convert
from export.normalisation import feed_bytes, fuse_normalisation
from serve.contract.metadata import ModelMetadata
from serve.contract.preprocess import Preprocess
from train.models.classifier import ImageClassifier

SIZE = 15


class Network(nn.Module):
    """One convolution, so that its border is a large part of the answer."""

    def __init__(self, **options: object):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().amax((2, 3)))  # type: ignore[no-any-return]


class Mirrored(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.flip(3))


class PaddedFirst(Network):
    """As TensorFlow's "same" padding is written in PyTorch: 1 on one side, 2 on the other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 2, 1, 2)))


class PaddedWithGrey(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 2, 1, 2), value=0.5))


class WithColour(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean((2, 3))[:, :2]


def exported(network: nn.Module, path: Path) -> onnx.ModelProto:
    metadata = ModelMetadata(("a", "b"), Preprocess("squash", SIZE, SIZE))
    convert(ImageClassifier(network).eval(), metadata, path)
    return onnx.load(path)


def logits(model: onnx.ModelProto) -> NDArray[np.float32]:
    pixels = np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3), np.uint8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answers: NDArray[np.float32] = session.run(["logits"], {"images": pixels})[0]
    return answers


@pytest.mark.parametrize(
    "network",
    [
        Network(padding=2),
        Network(padding=2, stride=2, bias=False),
        Network(padding=3, dilation=2),
        Network(),
        Mirrored(padding=2),
        PaddedFirst(),
    ],
    ids=lambda network: f"{type(network).__name__} {network.conv.extra_repr()}",
)
def test_fused_answers_are_the_same(network: nn.Module, tmp_path: Path) -> None:
    model = exported(network, tmp_path / "model.onnx")
    expected = logits(model)
    assert fuse_normalisation(model)
    onnx.checker.check_model(model, full_check=True)
    assert not {"Sub", "Div"} & {node.op_type for node in model.graph.node}
    np.testing.assert_allclose(logits(model), expected, atol=2e-5)


def test_leaving_the_mask_out_would_be_seen_at_the_border(tmp_path: Path) -> None:
    """What a folded bias would amount to: the mean is taken from the padding, too."""
    model = exported(Network(padding=2), tmp_path / "model.onnx")
    expected = logits(model)
    assert fuse_normalisation(model)
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    stored = {i.name: i for i in model.graph.initializer}
    weight = numpy_helper.to_array(stored[conv.input[1]]).copy()
    bias = numpy_helper.to_array(stored[conv.input[2]]) + 255 * weight[:, 3].sum((1, 2))
    weight[:, 3] = 0
    stored[conv.input[1]].CopyFrom(numpy_helper.from_array(weight, conv.input[1]))
    stored[conv.input[2]].CopyFrom(numpy_helper.from_array(bias.astype(np.float32), conv.input[2]))
    assert np.abs(logits(model) - expected).max() > 0.05


@pytest.mark.parametrize("network", [PaddedWithGrey(), WithColour()], ids=lambda n: type(n).__name__)
def test_a_graph_that_uses_the_values_otherwise_is_left_alone(network: nn.Module, tmp_path: Path) -> None:
    model = exported(network, tmp_path / "model.onnx")
    before = model.SerializeToString()
    assert not fuse_normalisation(model)
    assert model.SerializeToString() == before


def test_bytes_go_straight_in_only_at_scale_1_and_zero_point_0(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for scale, zero, fed in ((1.0, 0, True), (0.98, 0, False), (1.0, 1, False)):
        model = exported(Network(padding=2), tmp_path / "model.onnx")
        assert fuse_normalisation(model)
        graph = model.graph
        graph.initializer.append(numpy_helper.from_array(np.float32(scale), "scale"))
        graph.initializer.append(numpy_helper.from_array(np.uint8(zero), "zero"))
        conv = next(i for i, node in enumerate(graph.node) if node.op_type == "Conv")
        graph.node[conv].input[0] = "floats"
        for kind, source, target in (
            ("Dequantize", "bytes", "floats"),
            ("Quantize", "pixels_and_mask", "bytes"),
        ):
            node = onnx.helper.make_node(f"{kind}Linear", [source, "scale", "zero"], [target], name=kind)
            graph.node.insert(conv, node)
        expected = logits(model)
        feed_bytes(model)
        assert ("Cast" in {node.op_type for node in graph.node}) != fed
        np.testing.assert_array_equal(logits(model), expected)

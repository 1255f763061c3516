"""int8 and float16 graphs: close to float32, fed with bytes, the last and chosen layers left alone."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from export.convert import convert
from export.quantization import Quantizer, correct_biases, onnx_probabilities, optimise, run, to_fp16
from serve.contract.metadata import INPUT_NAME, ModelMetadata
from serve.contract.preprocess import Preprocess
from train.models.build import build_model

SIZE = 48
CLASSES = ("a", "b", "c")


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colour, brighter and darker, with some noise: as photographs have, and bare noise has not."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 255, (count, 2, 2, 3))
    ramp = np.linspace(0, 1, SIZE)
    rows = corners[:, 0, :, None] * (1 - ramp)[:, None] + corners[:, 1, :, None] * ramp[:, None]
    smooth = rows[:, 0, :, None] * (1 - ramp)[:, None] + rows[:, 1, :, None] * ramp[:, None]
    return np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)


def exported(name: str, path: Path) -> onnx.ModelProto:
    """With batch-norm statistics of such images; its weights are random."""
    torch.manual_seed(0)
    model, _ = build_model(name, len(CLASSES), SIZE)
    model.train()
    with torch.no_grad():
        for step in range(12):
            model(torch.from_numpy(images(16, step)))
    convert(model.eval(), ModelMetadata(CLASSES, Preprocess("squash", SIZE, SIZE)), path)
    return optimise(path)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnx.ModelProto, Quantizer]:
    model = exported("resnet18", tmp_path_factory.mktemp("resnet") / "model.onnx")
    return model, Quantizer(model, images(32, 99))


def logits(model: onnx.ModelProto, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return next(iter(run(model, ["logits"], [pixels])))[0]


def integer_layers(model: onnx.ModelProto) -> list[str]:
    """Layers that read dequantised weights, as onnxruntime recognises them."""
    weights = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    return [n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm") and n.input[1] in weights]


def test_int8_is_close_to_float32_and_takes_bytes(resnet: tuple[onnx.ModelProto, Quantizer]) -> None:
    model, quantizer = resnet
    quantised = quantizer.quantize()
    onnx.checker.check_model(quantised, full_check=True)
    pixels = images(24, 7)
    expected, got = logits(model, pixels), logits(quantised, pixels)
    assert np.sqrt(((got - expected) ** 2).mean()) < 0.1 * expected.std()
    assert quantizer.fused
    assert not {"Cast", "Sub", "Div"} & {node.op_type for node in quantised.graph.node}
    entry = next(node for node in quantised.graph.node if INPUT_NAME in node.input)
    assert entry.op_type == "Pad"


def test_all_layers_but_the_last_become_int8(resnet: tuple[onnx.ModelProto, Quantizer]) -> None:
    _, quantizer = resnet
    names = quantizer.layers()
    assert len(names) == 20  # ResNet-18's convolutions; its last layer is not among them
    assert set(integer_layers(quantizer.quantize())) == set(names)
    kept = names[3:5]
    assert set(integer_layers(quantizer.quantize(kept))) == set(names) - set(kept)


def test_weights_fit_in_7_bits_so_that_no_processor_saturates(
    resnet: tuple[onnx.ModelProto, Quantizer],
) -> None:
    """Two products of a byte and such a weight fit in 16 bits, in which x86 without VNNI adds them."""
    quantised = resnet[1].quantize()
    stored = {i.name: numpy_helper.to_array(i) for i in quantised.graph.initializer}
    producers = {n.output[0]: n for n in quantised.graph.node}
    convolutions = [n for n in quantised.graph.node if n.op_type == "Conv"]
    weights = [stored[producers[n.input[1]].input[0]] for n in convolutions]
    assert all(w.dtype == np.int8 and np.abs(w.astype(int)).max() <= 64 for w in weights)
    assert 2 * 255 * 64 < 2**15


def test_bias_correction_takes_the_shift_out_of_the_first_layer(
    resnet: tuple[onnx.ModelProto, Quantizer],
) -> None:
    """Weights that are all rounded down shift the output by the input's mean: much, for bytes."""
    _, quantizer = resnet
    quantised = quantizer.quantize()
    conv = next(n for n in quantised.graph.node if n.op_type == "Conv")
    producers = {n.output[0]: n for n in quantised.graph.node}
    stored = {i.name: i for i in quantised.graph.initializer}
    weight, bias = (stored[producers[name].input[0]] for name in conv.input[1:3])
    levels = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(np.maximum(levels, -63) - np.int8(1), weight.name))
    uncorrected = numpy_helper.to_array(bias).copy()

    def mean_output(model: onnx.ModelProto) -> NDArray[np.float32]:
        """Of the first layer, in each channel."""
        probe = onnx.ModelProto()
        probe.CopyFrom(model)
        name = next(n for n in probe.graph.node if n.name == conv.name).output[0]
        probe.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        return next(iter(run(probe, [name], [quantizer.pixels])))[0].mean((0, 2, 3))

    def shift() -> float:
        return float(np.abs(mean_output(quantised) - mean_output(quantizer.model)).mean())

    before = shift()
    correct_biases(quantizer.model, quantised, quantizer._means)
    assert (numpy_helper.to_array(bias) != uncorrected).all()
    assert shift() < 0.2 * before


@pytest.mark.slow
def test_depthwise_layers_and_squeeze_and_excitation_are_quantised_too(tmp_path: Path) -> None:
    model = exported("mobilenet_v3_small", tmp_path / "model.onnx")
    quantizer = Quantizer(model, images(16, 99))
    quantised = quantizer.quantize()
    onnx.checker.check_model(quantised, full_check=True)
    assert set(integer_layers(quantised)) == set(quantizer.layers())
    pixels = images(8, 7)
    assert np.abs(onnx_probabilities(quantised, pixels) - onnx_probabilities(model, pixels)).max() < 0.1


def test_float16_halves_the_file_and_keeps_input_and_outputs(
    resnet: tuple[onnx.ModelProto, Quantizer],
) -> None:
    model, _ = resnet
    half = to_fp16(model)
    onnx.checker.check_model(half, full_check=True)
    assert len(half.SerializeToString()) < 0.52 * len(model.SerializeToString())
    types = {v.name: v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)}
    assert types["images"] == onnx.TensorProto.UINT8
    assert types["logits"] == types["probabilities"] == onnx.TensorProto.FLOAT
    pixels = images(8, 7)
    np.testing.assert_allclose(
        onnx_probabilities(half, pixels), onnx_probabilities(model, pixels), atol=0.01
    )
    rows = onnx_probabilities(half, pixels).sum(axis=1)
    np.testing.assert_allclose(rows, 1, atol=1e-6)  # softmax is still float32

"""A float32 ONNX graph to int8 or float16: the one module that uses onnxruntime's converters.

Choices, measured by the error of logits on trained networks (ResNet-18, MobileNetV3-Small, simple_cnn):

- Ranges of activations are the least and greatest values seen (MinMax): as good as percentiles and entropy
  for ResNet-18, as good as percentiles and better than entropy for MobileNetV3-Small; and no activation has
  to be kept for a histogram.
- Weights have 7 bits and a scale for each output channel. 8 bits are better (error of ResNet-18's logits
  0.015 instead of 0.024), but on x86 processors without VNNI the sums of two products saturate, and the
  file would give other answers there than where it was verified.
- The last layer and what follows stay float32: they cost nothing, and answers of 256 levels are coarse.
- Rounded weights shift the mean of their layer's output; its bias takes that back (arXiv 1906.04721,
  section 4.2, here with means measured on the calibration images). The first layer needs it: its input are
  bytes, not values around 0, and uncorrected it made the error up to five times as large.
"""

import contextlib
import copy
import io
import logging
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
from onnxruntime.quantization import quantize_static as ort_quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from export.normalisation import feed_bytes, fuse_normalisation
from serve.contract.metadata import INPUT_NAME, LOGITS_NAME, PROBABILITIES_NAME
from serve.processors import available_processors

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # have weights, and nearly all of the arithmetic
# With them what lies between layers, so that bytes need not become floats and bytes again. Normalisation
# over features and softmax stay float32.
OP_TYPES = (
    *LAYERS,
    *("Relu", "LeakyRelu", "Clip", "Sigmoid", "Add", "Mul", "Concat"),
    *("MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Pad", "Slice", "Split"),
)
BATCH_SIZE = 16
Floats = NDArray[np.float32]


def optimise(path: Path) -> onnx.ModelProto:
    """Load an exported model with batch norm fused into convolutions, and with all shapes known."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        target = Path(folder) / "optimised.onnx"
        # its symbolic shape inference is for transformers' sequence lengths, and needs sympy
        quant_pre_process(path, target, skip_symbolic_shape=True)
        return onnx.load(target)


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float16 graph; its input, the last layer's output and what follows stay float32."""
    body = copy.deepcopy(model)
    names = {node.name for node in _after_last_layer(body)}
    head = [node for node in body.graph.node if node.name in names]
    for node in head:
        body.graph.node.remove(node)
    # The converter rounds up to and with the outputs: so for now these are the last layers'.
    outputs = list(body.graph.output)
    read = {name for node in head for name in node.input} | {output.name for output in outputs}
    made = {name for node in body.graph.node for name in node.output}
    constants = [copy.deepcopy(i) for i in body.graph.initializer if i.name in read]
    del body.graph.output[:]
    body.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in sorted(made & read)
    )
    body = convert_float_to_float16(body, keep_io_types=True)
    for constant in constants:  # the body may use the same one, in float16
        name, constant.name = constant.name, f"{constant.name}_of_head"
        for node in head:
            node.input[:] = [constant.name if n == name else n for n in node.input]
    body.graph.initializer.extend(constants)
    body.graph.node.extend(head)
    del body.graph.output[:]
    body.graph.output.extend(outputs)
    del body.graph.value_info[:]  # knows float32
    ir_model = onnx_ir.from_proto(body)
    ir_model.graph.sort()  # the converter appends its casts
    sorted_model: onnx.ModelProto = onnx_ir.to_proto(ir_model)
    return sorted_model


class Quantizer:
    """Calibrates once; then makes int8 graphs with any set of layers left in float32."""

    def __init__(self, model: onnx.ModelProto, pixels: NDArray[np.uint8]):
        """`model` is from `optimise`; `pixels` are training images, uint8 [N, size, size, 3]."""
        self.model = copy.deepcopy(model)
        self.fused = fuse_normalisation(self.model)
        if self.fused:
            self.model = onnx.shape_inference.infer_shapes(self.model)
        self.pixels = pixels
        self._head = [node.name for node in _after_last_layer(self.model, and_the_layer=True)]
        self._folder = tempfile.TemporaryDirectory()
        self._source = Path(self._folder.name) / "float32.onnx"
        onnx.save(self.model, self._source)
        self._means = self._input_means()

    def layers(self) -> list[str]:
        """Return the names of the layers that become int8, in the order of the graph."""
        return [n.name for n in self.model.graph.node if n.op_type in LAYERS and n.name not in self._head]

    def quantize(self, float_layers: Collection[str] = ()) -> onnx.ModelProto:
        """Return a QDQ graph, uint8 activations and 7-bit weights, but for `float_layers` and the last."""
        target = Path(self._folder.name) / "int8.onnx"
        with _quiet():
            ort_quantize_static(
                self._source,
                target,
                _Reader(self.pixels),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(OP_TYPES),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[*self._head, *float_layers],
                calibrate_method=CalibrationMethod.MinMax,
                calibration_cache_path=Path(self._folder.name) / "ranges.json",
            )
        quantised = onnx.load(target)
        correct_biases(self.model, quantised, self._means)
        feed_bytes(quantised)
        return quantised

    def _input_means(self) -> dict[str, NDArray[np.float64]]:
        """Return names of convolutions' inputs -> their channels' means over the calibration images."""
        model = copy.deepcopy(self.model)
        images = {i.name for i in model.graph.initializer if len(i.dims) == 4}  # of two-dimensional ones
        convolutions = [n for n in model.graph.node if n.op_type == "Conv" and n.input[1] in images]
        names = sorted({node.input[0] for node in convolutions})
        axes = "input_mean_axes"
        model.graph.initializer.append(numpy_helper.from_array(np.array([0, 2, 3], np.int64), axes))
        for i, name in enumerate(names):
            mean = f"input_mean_{i}"
            model.graph.node.append(helper.make_node("ReduceMean", [name, axes], [mean], keepdims=0))
            model.graph.output.append(helper.make_tensor_value_info(mean, onnx.TensorProto.FLOAT, None))
        wanted = [f"input_mean_{i}" for i in range(len(names))]
        batches = list(_batches(self.pixels))
        sizes, means = [len(batch) for batch in batches], zip(*run(model, wanted, batches), strict=True)
        return {n: np.average(mean, axis=0, weights=sizes) for n, mean in zip(names, means, strict=True)}


def correct_biases(
    model: onnx.ModelProto, quantised: onnx.ModelProto, means: dict[str, NDArray[np.float64]]
) -> None:
    """Add to each int8 convolution's bias what rounding its weights takes from the mean of its output."""
    floats = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    original = {node.name: node for node in model.graph.node if node.op_type == "Conv"}
    stored = {i.name: i for i in quantised.graph.initializer}
    producers = {name: node for node in quantised.graph.node for name in node.output}
    for node in quantised.graph.node:
        if node.op_type != "Conv" or len(node.input) < 3:
            continue
        weight, bias = producers.get(node.input[1]), producers.get(node.input[2])
        if weight is None or bias is None:  # this layer stayed float32
            continue
        rounded, scale, bias_levels, bias_scale = (
            numpy_helper.to_array(stored[name]) for name in (*weight.input[:2], *bias.input[:2])
        )
        source = original[node.name]
        if source.input[0] not in means:
            continue
        exact = floats[source.input[1]].astype(np.float64)
        error = (exact - rounded.astype(np.float64) * scale.reshape(-1, 1, 1, 1)).sum(axis=(2, 3))
        mean = means[source.input[0]]
        per_group = error.shape[1]
        by_group = error.reshape(len(mean) // per_group, -1, per_group) * mean.reshape(-1, 1, per_group)
        shift = by_group.sum(axis=2).ravel()
        corrected = bias_levels.astype(np.int64) + np.round(shift / bias_scale).astype(np.int64)
        limits = np.iinfo(np.int32)
        levels = np.clip(corrected, limits.min, limits.max).astype(np.int32)
        stored[bias.input[0]].CopyFrom(numpy_helper.from_array(levels, bias.input[0]))


def run(
    model: onnx.ModelProto, outputs: Sequence[str], batches: Sequence[NDArray[np.uint8]]
) -> Iterator[list[Floats]]:
    """Yield the named outputs of a graph that is not a served model, batch by batch."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = available_processors()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for batch in batches:
        yield session.run(list(outputs), {INPUT_NAME: batch})


def onnx_probabilities(model: onnx.ModelProto, pixels: NDArray[np.uint8]) -> Floats:
    """Return float32 [N, num_classes]."""
    answers = run(model, [PROBABILITIES_NAME], list(_batches(pixels)))
    return np.concatenate([values for (values,) in answers])


def _batches(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(pixels), BATCH_SIZE):
        yield pixels[start : start + BATCH_SIZE]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, pixels: NDArray[np.uint8]):
        self.batches = _batches(pixels)

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        batch = next(self.batches, None)
        return None if batch is None else {INPUT_NAME: batch}


def _after_last_layer(model: onnx.ModelProto, and_the_layer: bool = False) -> list[onnx.NodeProto]:
    """Return the nodes from the outputs back to the last layers with weights."""
    producers = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, onnx.NodeProto] = {}
    names = [LOGITS_NAME, PROBABILITIES_NAME]
    while names:
        node = producers.get(names.pop())
        if node is None or node.name in found:
            continue
        if node.op_type not in LAYERS:
            found[node.name] = node
            names.extend(node.input)
        elif and_the_layer:
            found[node.name] = node
    return list(found.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converters, which print their progress and advice that does not apply."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)

"""Fuse the normalisation of pixels into the first convolution, exactly, so that bytes can go straight in.

The exported graph computes conv((pixels - mean) / std) and pads it with zeros, which are pixels of the
mean's colour. Weights can be divided by std, but a bias cannot take the mean: at the border some taps see
padding, where nothing must be subtracted. So the mean goes through a fourth channel that is 255 in the
image, and like every channel 0 in the padding:

    conv(w, (p - mean) / std)  =  conv([w / std, -sum(w * mean / std) / 255], [p, 255])

A uint8 convolution's kernels take the channels in groups of four anyway.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from serve.contract.metadata import INPUT_NAME

WHITE = 255
PADDED, TURNED, PIXELS = "images_and_mask", "images_and_mask_nchw", "pixels_and_mask"


def fuse_normalisation(model: onnx.ModelProto) -> bool:
    """Change the graph in place; False, and no change, when it does not begin as exported networks do.

    Between normalisation and convolutions there may be mirroring (Slice) and padding with zeros.
    """
    graph = model.graph
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    start = _normalisation(graph, arrays)
    if start is None:
        return False
    nodes, mean, std = start
    convolutions = _convolutions(graph, arrays, nodes[-1].output[0], len(mean))
    if convolutions is None:
        return False
    new: dict[str, NDArray[Any]] = {
        "mask_pads": np.array([0, 0, 0, 0, 0, 0, 0, 1], np.int64),
        "mask_value": np.array(WHITE, np.uint8),
    }
    for conv in convolutions:
        weight = arrays[conv.input[1]].astype(np.float64) / std.reshape(1, -1, 1, 1)
        mask = -(weight * mean.reshape(1, -1, 1, 1)).sum(axis=1, keepdims=True) / WHITE
        name = f"{conv.input[1]}_folded"
        new[name] = np.concatenate([weight, mask], axis=1).astype(np.float32)
        conv.input[1] = name
        if len(conv.input) < 3:  # `correct_biases` needs one to change
            conv.input.append(f"{name}_bias")
            new[f"{name}_bias"] = np.zeros(len(weight), np.float32)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in new.items())
    _bypass(graph, nodes, [nodes[-1].output[0]], PIXELS)
    for node in (
        helper.make_node("Cast", [TURNED], [PIXELS], name="to_float", to=onnx.TensorProto.FLOAT),
        helper.make_node("Transpose", [PADDED], [TURNED], name="to_nchw", perm=[0, 3, 1, 2]),
        helper.make_node("Pad", [INPUT_NAME, "mask_pads", "mask_value"], [PADDED], name="add_mask"),
    ):
        graph.node.insert(0, node)
    del graph.value_info[:]  # knows three channels
    _drop_unused(graph)
    return True


def feed_bytes(model: onnx.ModelProto) -> None:
    """Leave pixels bytes where they become floats only to be quantised with scale 1 and zero point 0."""
    graph = model.graph
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    cast = [n for n in graph.node if n.op_type == "Cast" and n.output[0] == PIXELS]
    readers = _readers(graph, PIXELS)
    if cast and readers and all(_is_identity(node, arrays) for node in readers):
        _bypass(graph, cast + readers, [node.output[0] for node in readers], cast[0].input[0])
        _drop_unused(graph)


def _is_identity(node: NodeProto, arrays: dict[str, NDArray[Any]]) -> bool:
    if node.op_type != "QuantizeLinear":
        return False
    scale, zero = arrays[node.input[1]], arrays[node.input[2]]
    return scale.item() == 1.0 and zero.item() == 0 and zero.dtype == np.uint8


def _readers(graph: onnx.GraphProto, name: str) -> list[NodeProto]:
    return [node for node in graph.node if name in node.input]


def _bypass(graph: onnx.GraphProto, nodes: list[NodeProto], outputs: Collection[str], instead: str) -> None:
    """Remove nodes; what read their `outputs` reads another tensor."""
    for node in nodes:
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [instead if name in outputs else name for name in node.input]


def _normalisation(
    graph: onnx.GraphProto, arrays: dict[str, NDArray[Any]]
) -> tuple[list[NodeProto], NDArray[np.float64], NDArray[np.float64]] | None:
    """Return ([Transpose, Cast, Sub, Div], mean, std), or None when the graph begins differently."""
    nodes: list[NodeProto] = []
    name = INPUT_NAME
    for kind in ("Transpose", "Cast", "Sub", "Div"):
        readers = _readers(graph, name)
        if len(readers) != 1 or readers[0].op_type != kind or readers[0].input[0] != name:
            return None
        nodes.append(readers[0])
        name = readers[0].output[0]
    order = helper.get_node_attr_value(nodes[0], "perm")
    values = [arrays.get(node.input[1]) for node in nodes[2:]]
    if order != [0, 3, 1, 2] or any(v is None or v.shape != (1, 3, 1, 1) for v in values):
        return None
    mean, std = (np.asarray(v, np.float64).reshape(-1) for v in values)
    return nodes, mean, std


def _convolutions(
    graph: onnx.GraphProto, arrays: dict[str, NDArray[Any]], start: str, channels: int
) -> list[NodeProto] | None:
    """Return every convolution that the tensor reaches; None when anything else computes with it."""
    found: list[NodeProto] = []
    names = [start]
    while names:
        name = names.pop()
        for node in _readers(graph, name):
            if node.op_type == "Conv" and node.input[0] == name:
                weight = arrays.get(node.input[1])
                if weight is None or weight.ndim != 4 or weight.shape[1] != channels:
                    return None
                found.append(node)
            elif _keeps_channels(node, arrays):
                names.append(node.output[0])
            else:
                return None
    return found or None


def _keeps_channels(node: NodeProto, arrays: dict[str, NDArray[Any]]) -> bool:
    if node.op_type == "Slice" and len(node.input) > 3:
        axes = arrays.get(node.input[3])
        return axes is not None and set(axes.tolist()) <= {2, 3, -1, -2}
    if node.op_type == "Pad" and len(node.input) < 4:
        pads = arrays.get(node.input[1])
        value = arrays.get(node.input[2]) if len(node.input) > 2 else np.zeros(())
        modes = [helper.get_attribute_value(a) for a in node.attribute if a.name == "mode"]
        with_zeros = modes in ([], [b"constant"]) and value is not None and value.item() == 0
        return with_zeros and pads is not None and not pads[[0, 1, 4, 5]].any()
    return False


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    for initializer in [i for i in graph.initializer if i.name not in used]:
        graph.initializer.remove(initializer)

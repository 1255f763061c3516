"""Convolutions in bf16: as near to float32's answers and gradients as torch's own, whatever their shape."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_data import settings

from train.distributed import Ranks
from train.engine.state import build_state
from train.models import convolutions
from train.models.build import build_model
from train.models.convolutions import Bf16Convolutions
from train.precision import Precision

CPU, BF16 = torch.device("cpu"), Precision("bfloat16")
# channels in, out, height, width; kernel, stride, padding, groups
SHAPES = {
    "4 x 4 outputs": (16, 24, (4, 4), 3, 1, 1, 1),
    "many channels": (256, 16, (3, 4), 3, 1, 1, 1),
    "many channels, strided": (256, 16, (7, 8), 3, 2, 1, 1),
    "strided without padding": (256, 8, (9, 8), 3, 2, 0, 1),
    "a rest that no window reaches": (256, 8, (8, 8), 3, 4, 0, 1),
    "stride above the kernel": (256, 8, (7, 7), 1, 2, 0, 1),
    "rectangular": (256, 8, (5, 4), (3, 1), (2, 1), (1, 0), 1),
    "8 x 8 outputs": (16, 24, (8, 8), 3, 1, 1, 1),
    "large": (8, 8, (20, 21), 3, 1, 1, 1),
    "pointwise, large": (24, 8, (20, 21), 1, 1, 0, 1),
    "pointwise, 1 x 1": (24, 8, (1, 1), 1, 1, 0, 1),
    "one channel": (1, 8, (6, 6), 3, 1, 1, 1),
    "patches of a transformer": (3, 24, (32, 32), 16, 16, 0, 1),
    "depthwise": (16, 16, (9, 9), 5, 2, 2, 16),
    "depthwise, 7 x 7": (8, 8, (9, 10), 7, 1, 3, 8),
    "depthwise, one column": (8, 8, (9, 1), 7, 1, 3, 8),
    "depthwise, wide": (8, 8, (4, 11), (1, 4), (1, 3), (0, 1), 8),
    "depthwise, more padding than kernel": (8, 8, (3, 3), 3, 1, 4, 8),
    "depthwise, two kernels a channel": (16, 32, (9, 9), 3, 1, 1, 16),
    "grouped": (16, 32, (9, 9), 3, 1, 1, 4),
}


def passes(
    layer: nn.Conv2d, images: Tensor, gradient: Tensor, context: torch.overrides.TorchFunctionMode | None
) -> list[Tensor]:
    """Return output and gradients of the images, the weight and the bias; in float32 without a context."""
    layer.zero_grad()
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=context is not None):
        if context is None:
            output = layer(images)
        else:
            with context:
                output = layer(images)
    output.backward(gradient.to(output.dtype))
    assert images.grad is not None
    gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    return [output.detach(), images.grad, *gradients]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients_are_those_of_float32(shape, bias) -> None:
    channels, outputs, size, kernel, stride, padding, groups = shape
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, outputs, kernel, stride, padding, groups=groups, bias=bias)
    layer.to(memory_format=torch.channels_last)
    images = torch.randn(6, channels, *size).to(memory_format=torch.channels_last)
    gradient = torch.randn_like(layer(images))
    exact = passes(layer, images, gradient, None)
    found = passes(layer, images, gradient, Bf16Convolutions(products=True))
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in exact]
    assert max(errors(found, exact)) < 0.006  # a number of bf16 is off by 0.002 on average
    assert found[0].dtype == torch.bfloat16
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert layer.weight.grad is not None
    assert layer.weight.grad.stride() == layer.weight.stride(), "an optimizer's fused step needs the same"


@pytest.mark.parametrize(("size", "groups"), [(1, 1), (4, 1), (20, 1), (9, 16)])
def test_the_next_layer_may_change_the_output_in_place(size, groups) -> None:
    layer = nn.Conv2d(16, 16, 1, groups=groups, bias=False).to(memory_format=torch.channels_last)
    images = torch.randn(2, 16, size, size).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), Bf16Convolutions(products=True):
        F.relu_(layer(images)).sum().backward()
    assert images.grad is not None
    assert layer.weight.grad is not None


def test_a_gradient_that_is_not_needed_is_not_computed() -> None:
    layer = nn.Conv2d(256, 8, 3, padding=1).requires_grad_(False).to(memory_format=torch.channels_last)
    images = torch.randn(2, 256, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), Bf16Convolutions(products=True):
        layer(images).sum().backward()
    assert images.grad is not None
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("images", "kernels", "settings"),
    [
        (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), {"padding": "same"}),
        (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), {"dilation": 2}),
        (torch.randn(3, 8, 8), torch.randn(4, 3, 3, 3), {}),
        (torch.randn(2, 3, 8, 8).double(), torch.randn(4, 3, 3, 3).double(), {}),
    ],
    ids=["same", "dilated", "one image", "float64"],
)
def test_other_calls_are_left_to_torch(images, kernels, settings) -> None:
    if images.ndim == 4:
        images = images.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.conv2d(images, kernels, **settings)
        with Bf16Convolutions(products=True):
            found = F.conv2d(images, kernels, **settings)
    assert found.dtype == expected.dtype
    assert found.equal(expected)


def test_a_part_that_leaves_autocast_stays_in_float32() -> None:
    images, kernels = torch.randn(2, 16, 4, 4), torch.randn(8, 16, 3, 3)
    on, off = torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)
    with on, Bf16Convolutions(products=True), off:
        found = F.conv2d(images.to(memory_format=torch.channels_last), kernels)
    assert found.dtype == torch.float32


@pytest.mark.parametrize(("amx", "products"), [(True, True), (False, False)])
def test_dense_convolutions_are_products_with_amx_alone(monkeypatch, amx, products) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    context = convolutions.convolutions(BF16, CPU, compiled=False)
    assert isinstance(context, Bf16Convolutions)
    assert context.products == products


@pytest.mark.parametrize(
    ("precision", "device", "compiled"),
    [
        (Precision(""), CPU, False),
        (Precision("bfloat16", channels_last=False), CPU, False),
        (BF16, torch.device("cuda"), False),
        (BF16, CPU, True),
    ],
)
def test_float32_gpus_and_compilers_keep_torchs_convolutions(precision, device, compiled) -> None:
    assert not isinstance(convolutions.convolutions(precision, device, compiled), Bf16Convolutions)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_trains_with_them_unless_it_is_compiled(monkeypatch, tmp_path, compiled) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **_: None
    )  # it needs a C compiler and a minute
    model, _ = build_model("simple_cnn", 2, 16)
    config = settings(tmp_path, compile=compiled, precision="bf16")
    state = build_state(config, model, 3, BF16, Ranks(), CPU)
    state.begin_epoch(0, config)
    pending, names = [state.forward(torch.zeros(2, 16, 16, 3, dtype=torch.uint8)).grad_fn], set()
    while pending:
        node = pending.pop()
        names.add(type(node).__name__)
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    assert ("MatrixConvolutionBackward" in names) is not compiled

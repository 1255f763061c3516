"""Convolutions in bf16 on a CPU, by other ways where oneDNN's take several times as long.

Its dense convolutions fill AMX's tiles of 16 rows from one row of a feature map: on the small maps of a
network's last layers most of a tile is empty. A product of the patches of all images fills it. Its
gradients of depthwise convolutions are slow in bf16 with strides and with kernels above 3 x 3, and in
float32 for the weights of kernels more than 3 wide. benchmarks/convolutions.py shows when a newer oneDNN
lets this module go.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from train.precision import Precision

# outputs of 4 x 4 and 8 x 8, from layers timed on two cores with AMX: docs/experiments.md, no. 62
FEW_POSITIONS = 16  # all three passes are products
MORE_POSITIONS = 64  # the gradient of the weights is one
MANY_CHANNELS = 256  # with which adding up the gradients of overlapping patches costs less than it saves
FAST_WIDTH = 3  # of depthwise kernels whose gradients are fast

Pair = tuple[int, int]


def convolutions(precision: Precision, device: torch.device, compiled: bool) -> AbstractContextManager[Any]:
    """Return the context of forward passes in this precision."""
    if (
        device.type == "cpu"
        and precision.autocast == "bfloat16"
        and precision.channels_last
        and not compiled
    ):
        return Bf16Convolutions(products=bool(torch.cpu.get_capabilities().get("amx_bf16")))
    return nullcontext()


class Bf16Convolutions(TorchFunctionMode):
    """Context in which each call of torch.conv2d under autocast takes this module's functions, where they
    apply."""

    def __init__(self, products: bool):
        """`products` lets dense convolutions be products of matrices, which pays with AMX alone."""
        super().__init__()
        self.products = products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            return self._conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        way: type[DepthwiseConvolution | MatrixConvolution] | None = None
        if groups > 1 and weight.shape[1] == 1:
            way = DepthwiseConvolution
        elif groups == 1 and self.products:
            way = MatrixConvolution
        if (
            way is None
            or isinstance(padding, str)
            or pair(dilation) != (1, 1)
            or input.dtype not in (torch.float32, torch.bfloat16)
            or input.ndim != 4
            or not input.is_contiguous(memory_format=torch.channels_last)
            or not torch.is_autocast_enabled("cpu")  # some networks leave it for a part
        ):
            return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
        images, kernels = input.to(torch.bfloat16), weight.to(torch.bfloat16)
        output: Tensor = way.apply(images, kernels, pair(stride), pair(padding))
        return output if bias is None else output + bias.to(torch.bfloat16)[:, None, None]


def pair(value: Any) -> Pair:
    if isinstance(value, int):
        return value, value
    first, last = value[0], value[-1]
    return int(first), int(last)


def torch_gradients(
    images: Tensor,
    weight: Tensor,
    gradient: Tensor,
    stride: Pair,
    padding: Pair,
    needed: list[bool],
    groups: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """Return torch's gradients of the images and of the weight, as far as needed."""
    settings = (list(stride), list(padding), [1, 1], False, [0, 0], groups)
    found = torch.ops.aten.convolution_backward(gradient, images, weight, None, *settings, [*needed, False])
    return found[0], found[1]


class DepthwiseConvolution(torch.autograd.Function):
    """Convolution of each channel by its own kernels in bf16, with faster gradients than oneDNN's."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return torch.conv2d(images, weight, None, stride, padding, groups=images.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (images, weight), (stride, padding) = ctx.saved_tensors, (ctx.stride, ctx.padding)
        first, second = None, None
        if ctx.needs_input_grad[0]:
            first = depthwise_gradient_of_images(images, weight, gradient, stride, padding)
        if ctx.needs_input_grad[1]:
            second = depthwise_gradient_of_weight(images, weight, gradient, stride, padding)
        return first, second, None, None


def depthwise_gradient_of_images(
    images: Tensor, weight: Tensor, gradient: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    """Return the gradient of the images: with stride 1 a convolution in bf16 by the turned kernels."""
    groups, (height, width) = images.shape[1], weight.shape[2:]
    top, left = height - 1 - padding[0], width - 1 - padding[1]
    if stride == (1, 1) and len(weight) == groups and top >= 0 and left >= 0:
        return torch.conv2d(gradient, weight.flip(2, 3), None, 1, (top, left), groups=groups)
    tensors = images.float(), weight.float(), gradient.float()
    found, _ = torch_gradients(*tensors, stride, padding, [True, False], groups)
    assert found is not None
    return found.to(gradient.dtype)


def depthwise_gradient_of_weight(
    images: Tensor, weight: Tensor, gradient: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    """Return the gradient of the weight, computed in float32 for a few columns of the kernel at a time,
    from the columns of the padded images under them."""
    (count, groups, rows, columns), gradient32 = images.shape, gradient.float()
    found = torch.empty_like(weight)
    for start in range(0, weight.shape[3], FAST_WIDTH):
        part = slice(start, start + FAST_WIDTH)
        kernel = weight[..., part].float()
        size = stride[1] * (gradient.shape[3] - 1) + kernel.shape[3]
        first = start - padding[1]  # column of the images; those outside of them are padding
        low = max(0, -first)
        high = max(low, min(size, columns - first))
        under = torch.empty(count, groups, rows, size, memory_format=torch.channels_last)
        under[..., :low], under[..., high:] = 0, 0
        under[..., low:high] = images[..., first + low : first + high]
        sides, needed = (padding[0], 0), [False, True]
        _, of_part = torch_gradients(under, kernel, gradient32, stride, sides, needed, groups)
        assert of_part is not None
        found[..., part] = of_part
    return found


class MatrixConvolution(torch.autograd.Function):
    """Convolution of [N, C, H, W] by [O, C, h, w] to [N, O, rows, columns], all in channels_last; each pass
    a product where that is faster, else torch's."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        height, width = weight.shape[2:]
        rows = (images.shape[2] + 2 * padding[0] - height) // stride[0] + 1
        columns = (images.shape[3] + 2 * padding[1] - width) // stride[1] + 1
        if rows * columns > FEW_POSITIONS and not is_pointwise(weight, stride, padding):
            return torch.conv2d(images, weight, None, stride, padding)
        # not a view of the product: layers after it may change it in place
        shape = len(images), len(weight), rows, columns
        output = torch.empty(shape, dtype=images.dtype, memory_format=torch.channels_last)
        inputs = patches(images, (height, width), stride, padding)
        # view, as a copy would leave the output unwritten
        torch.mm(inputs, as_rows(weight).T, out=output.permute(0, 2, 3, 1).view(len(inputs), -1))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (images, weight), stride, padding = ctx.saved_tensors, ctx.stride, ctx.padding
        positions, pointwise = gradient[0, 0].numel(), is_pointwise(weight, stride, padding)
        few = positions <= FEW_POSITIONS
        product = [
            pointwise or (few and weight.shape[1] >= MANY_CHANNELS),
            few or (positions <= MORE_POSITIONS and weight[0, 0].numel() > 1),
        ]
        found: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[0] and product[0]:
            found[0] = gradient_of_images(images, weight, gradient, stride, padding)
        if ctx.needs_input_grad[1] and product[1]:
            found[1] = gradient_of_weight(images, weight, gradient, stride, padding)
        needed = [ctx.needs_input_grad[i] and found[i] is None for i in (0, 1)]
        if any(needed):
            rest = torch_gradients(images, weight, gradient, stride, padding, needed)
            found = [own if own is not None else other for own, other in zip(found, rest, strict=True)]
        return found[0], found[1], None, None


def is_pointwise(weight: Tensor, stride: Pair, padding: Pair) -> bool:
    """Return whether each output position is a product of one input position, which needs no copies."""
    return (*weight.shape[2:], *stride, *padding) == (1, 1, 1, 1, 0, 0)


def patches(images: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Return the inputs of each output position, [N * rows * columns, h * w * C]; a view if it can be."""
    (top, left), channels = padding, images.shape[1]
    last = images.permute(0, 2, 3, 1)
    if top or left:
        last = F.pad(last, (0, 0, left, left, top, top))
    windows = last.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, kernel[0] * kernel[1] * channels)


def as_rows(weight: Tensor) -> Tensor:
    """Return weights [O, C, h, w] as [O, h * w * C]."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def positions_as_rows(gradient: Tensor) -> Tensor:
    """Return a gradient [N, O, rows, columns] as [N * rows * columns, O]."""
    return gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1])


def gradient_of_weight(
    images: Tensor, weight: Tensor, gradient: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    height, width = weight.shape[2:]
    turned = positions_as_rows(gradient).T.contiguous()  # oneDNN's own transposition takes longer
    rows = turned @ patches(images, (height, width), stride, padding)
    return rows.view(len(weight), height, width, -1).permute(0, 3, 1, 2)


def gradient_of_images(
    images: Tensor, weight: Tensor, gradient: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    """Return the sums over the patches that an input position is part of, added in float32."""
    (count, channels, *size), (height, width) = images.shape, weight.shape[2:]
    product = positions_as_rows(gradient) @ as_rows(weight)
    if is_pointwise(weight, stride, padding):
        return product.view(count, *size, channels).permute(0, 3, 1, 2)
    rows, columns = gradient.shape[2:]
    parts = product.view(count, rows, columns, height, width, channels)
    (top, left), (down, across) = padding, stride
    sums = images.new_zeros(count, size[0] + 2 * top, size[1] + 2 * left, channels, dtype=torch.float32)
    for i in range(height):
        for j in range(width):
            sums[:, i : i + down * rows : down, j : j + across * columns : across] += parts[:, :, :, i, j]
    inner = sums[:, top : top + size[0], left : left + size[1]]
    return inner.to(images.dtype).permute(0, 3, 1, 2)

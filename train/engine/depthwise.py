"""Depthwise convolutions of maps that are smaller than their kernel, as at the end of MobileNetV3 and
EfficientNet: a fast gradient of the weights on the CPU.

oneDNN leaves that one to its reference code, at a twentieth of the speed of the rest (docs/experiments.md,
no. 34).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input


class _Convolve(torch.autograd.Function):
    """A depthwise convolution with stride 1: x [N, C, H, W], weight [C, 1, KH, KW] -> [N, C, OH, OW]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, padding=padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = conv2d_input(x.shape, weight, gradient, padding=ctx.padding, groups=len(weight))  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(x, gradient, ctx.padding)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None


def weight_gradient(x: Tensor, gradient: Tensor, padding: tuple[int, int]) -> Tensor:
    """[C, 1, KH, KW] of x [N, C, H, W] and the output's gradient [N, C, OH, OW].

    It is a depthwise convolution itself: each channel of each image with its gradient as the kernel, and
    then the sum over images.
    """
    n, c, h, w = x.shape
    channels = x.permute(2, 3, 0, 1).reshape(1, h, w, n * c).permute(0, 3, 1, 2)  # in channels_last order
    kernels = gradient.reshape(n * c, 1, *gradient.shape[2:])
    each = F.conv2d(channels, kernels, padding=padding, groups=n * c)
    return each.view(n, c, *each.shape[2:]).sum(0).unsqueeze(1)


class DepthwiseConv2d(nn.Conv2d):
    """Computes what nn.Conv2d does, and its gradients up to the order of summation."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor
        small = input.shape[-2] < weight.shape[-2] or input.shape[-1] < weight.shape[-1]
        if small and input.ndim == 4 and _is_plain(input) and weight.requires_grad:
            output = _Convolve.apply(input, weight, bias, self.padding)
        else:
            output = super()._conv_forward(input, weight, bias)
        return output


def _is_plain(x: Tensor) -> bool:
    """Gradients are wanted of a tensor on the CPU in float32, and nobody traces."""
    return (
        torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def quicken_depthwise(network: nn.Module) -> None:
    """Turn the network's depthwise convolutions with stride 1 into `DepthwiseConv2d`, in place."""
    for module in network.modules():
        if (
            type(module) is nn.Conv2d
            and module.in_channels == module.out_channels == module.groups
            and module.stride == module.dilation == (1, 1)
            and module.padding_mode == "zeros"
            and isinstance(module.padding, tuple)
        ):
            module.__class__ = DepthwiseConv2d

"""Depthwise convolutions of small maps: torch's answers and gradients, by a faster way."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.engine.depthwise import DepthwiseConv2d, quicken_depthwise
from train.models.zoo import create


def convolution(
    kernel: tuple[int, int], size: tuple[int, int], channels_last: bool, bias: bool = True
) -> tuple[nn.Conv2d, Tensor]:
    """A depthwise convolution of 6 channels, and 5 images for it."""
    torch.manual_seed(0)
    padding = (kernel[0] // 2, kernel[1] // 2)
    order = torch.channels_last if channels_last else torch.contiguous_format
    layer = nn.Conv2d(6, 6, kernel, padding=padding, groups=6, bias=bias).to(memory_format=order)
    return layer, torch.randn(5, 6, *size).contiguous(memory_format=order)


def quickened(layer: nn.Conv2d) -> nn.Conv2d:
    network = nn.Sequential(copy.deepcopy(layer))
    quicken_depthwise(network)
    (quick,) = network
    assert type(quick) is DepthwiseConv2d
    return quick


def gradients(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    x = x.clone().requires_grad_()
    output = layer(x)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    yield from (output, x.grad, *(p.grad for p in layer.parameters()))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("kernel", "size"),
    [
        ((3, 3), (1, 1)),
        ((3, 3), (2, 2)),
        ((5, 5), (4, 4)),
        ((7, 7), (6, 3)),
        ((5, 3), (4, 9)),
        ((2, 5), (8, 3)),
    ],
)
def test_answers_and_gradients_are_torchs(
    kernel: tuple[int, int], size: tuple[int, int], channels_last: bool
) -> None:
    layer, x = convolution(kernel, size, channels_last)
    quick = quickened(layer)
    assert "_Convolve" in quick(x).grad_fn.name()
    for ours, theirs in zip(gradients(quick, x), gradients(layer, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_frozen_weights_and_a_layer_without_bias_are_fine() -> None:
    layer, x = convolution((5, 5), (3, 3), True, bias=False)
    quick = quickened(layer)
    quick(x).sum().backward()
    layer(x).sum().backward()
    torch.testing.assert_close(quick.weight.grad, layer.weight.grad)
    for frozen in (layer, quick):
        frozen.requires_grad_(False)
    for ours, theirs in zip(gradients(quick, x), gradients(layer, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_larger_maps_evaluation_and_bf16_are_left_to_torch() -> None:
    layer, x = convolution((5, 5), (4, 4), True)
    quick = quickened(layer)
    with torch.no_grad():
        assert torch.equal(quick(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert "_Convolve" not in quick(x).grad_fn.name()
        assert torch.equal(quick(x), layer(x))
    assert "_Convolve" not in quick(torch.randn(2, 6, 5, 5)).grad_fn.name()


def test_a_network_learns_the_same_and_keeps_its_names() -> None:
    torch.manual_seed(0)
    network = create("mobilenet_v3_small", 3, 64).train()
    plain, quick = network, copy.deepcopy(network)
    quicken_depthwise(quick)
    assert sum(isinstance(module, DepthwiseConv2d) for module in quick.modules()) == 7
    assert quick.state_dict().keys() == plain.state_dict().keys()
    x, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 3
    for one in (plain, quick):
        torch.manual_seed(1)  # dropout
        F.cross_entropy(one(x), labels).backward()
    for (name, ours), theirs in zip(quick.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)

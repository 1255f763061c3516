"""Locator of the subject where the classifier's own last feature map is active."""

import copy
import math
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve.contract.errors import UserError
from train.models.classifier import ImageClassifier
from train.models.subject_crop.crop import crop_and_resize, in_float32, whole

TAIL = 0.1  # share of the evidence that may lie outside the box, on each of its four sides
BACKGROUND = 0.01  # share of the evidence spread evenly: a map without any gives the whole image
SMALLEST_MAP = 3  # cells a side


class ActivationMap(nn.Module):
    """Locator of SubjectCrop by the evidence for the classes in a feature map.

    With global average pooling and one linear layer behind the map, the evidence is the class activation
    map (arXiv 1512.04150) of each class less the mean over the classes, its positive part weighted with the
    class's probability. Otherwise it is the map's energy, the mean square over its channels.
    """

    def __init__(
        self, layer: str, head: str, rectified: bool, threshold: float, scale: float, grid: tuple[int, int]
    ):
        """
        Args:
            layer: name in the network of the module whose output is the map.
            head: name of the linear layer, or "" for the energy.
            rectified: the pooling sees the map's positive part.
            threshold: share of the map's maximum below which a cell is background.
            scale: side of the view that the network sees, as a share of the whole image's.
            grid: (stride, remainder) of the view's side; see `symmetric_grid`.
        """
        super().__init__()
        self.layer, self.head, self.rectified = layer, head, rectified
        self.threshold, self.scale, self.grid = threshold, scale, grid
        self.kept_head: nn.Linear | None = None
        """The linear layer of a network that ends before it."""

    def forward(self, pixels: Tensor, classifier: ImageClassifier) -> tuple[Tensor, Tensor]:
        """Return boxes [N, 4] around the evidence in float32 [N, 3, P, P] of 0..255, and logits."""
        view = on_grid(self.scale * pixels.shape[-1], *self.grid)
        network, found = classifier.network, list[Tensor]()
        hook = network.get_submodule(self.layer).register_forward_hook(lambda *args: found.append(args[2]))
        try:
            scores = classifier.score(crop_and_resize(pixels, whole(pixels), view))
        finally:
            hook.remove()
        with in_float32(pixels):
            evidence = self.evidence(network, scores, channels_first(found[0]).float())
            return box_of_map(evidence, self.threshold), scores

    def evidence(self, network: nn.Module, scores: Tensor, features: Tensor) -> Tensor:
        """Return [N, h, w], not negative, of logits [N, num_classes] and a map [N, C, h, w]."""
        if not self.head:
            return features.square().mean(1)
        head = self.kept_head or network.get_submodule(self.head)
        assert isinstance(head, nn.Linear)
        logits = scores if self.kept_head is None else head(scores)
        maps = F.conv2d(F.relu(features) if self.rectified else features, head.weight[:, :, None, None])
        maps = F.relu(maps - maps.mean(1, keepdim=True))
        return (maps * logits.softmax(1)[:, :, None, None]).sum(1)


def box_of_map(evidence: Tensor, threshold: float) -> Tensor:
    """Return boxes [N, 4] around what exceeds `threshold` of each maximum of [N, h, w], not negative."""
    largest = evidence.amax((1, 2), keepdim=True)
    excess = F.relu(evidence / (largest + 1e-12) - threshold)
    left, right = span(excess.sum(1))
    upper, lower = span(excess.sum(2))
    return torch.stack([left, upper, right, lower], 1)


def span(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions, each [N] in 0..1, before which TAIL and 1 - TAIL of the mass [N, cells] lie.

    Mass is even within a cell, and no cell is empty: the quantiles cannot jump.
    """
    cells = mass.shape[1]
    mass = (1 - BACKGROUND) * mass / (mass.sum(1, keepdim=True) + 1e-12) + BACKGROUND / cells
    mass = mass / mass.sum(1, keepdim=True)
    earlier = torch.ones(cells, cells, dtype=torch.bool, device=mass.device).tril(-1)
    before = (mass[:, None] * earlier).sum(2)  # cumsum is not deterministic on CUDA
    first, last = (((share - before) / mass).clamp(0.0, 1.0).mean(1) for share in (TAIL, 1 - TAIL))
    return first, last


def channels_first(features: Tensor) -> Tensor:
    """Return square maps as [N, C, h, w]; some transformers have [N, h, w, C]."""
    _, a, b, c = features.shape
    return features.permute(0, 3, 1, 2) if a == b != c else features


@torch.no_grad()
def find_activation_map(
    network: nn.Module, name: str, size: int, threshold: float, scale: float
) -> ActivationMap:
    """Return the locator by the network's last feature map for images of `size` pixels, and by the linear
    layer that reads it where global average pooling alone is between them. Raises UserError if there is no
    such map, or it has too few cells."""
    probe = copy.deepcopy(network).double().eval()  # `equal` needs its precision
    generator = torch.Generator().manual_seed(0)
    for module in probe.modules():
        if isinstance(module, nn.Linear):  # some heads start at zero, where anything fits
            module.weight.normal_(generator=generator)
    outputs = outputs_of(probe, torch.randn(2, 3, size, size, dtype=torch.float64, generator=generator))
    calls = Counter(key for key, _ in outputs)
    maps = [(key, channels_first(out)) for key, out in outputs if out.ndim == 4 and calls[key] == 1]
    maps = [(key, out) for key, out in maps if min(out.shape[2:]) >= SMALLEST_MAP]
    spatial = [out.ndim for _, out in outputs if out.ndim in (3, 4)]  # 3: a sequence of tokens
    if not maps or spatial[-1] == 3:
        raise UserError(
            f"--subject-crop cam: {name} has no feature map of {SMALLEST_MAP} cells a side at {size} "
            "pixels; use a convolutional network, larger images, or --subject-crop detector"
        )
    layer, features = maps[-1]
    head, rectified = find_head(probe, outputs, features)
    grid = symmetric_grid(probe, layer, size, features.shape[2])
    return ActivationMap(layer, head, rectified, threshold, scale, grid)


def outputs_of(network: nn.Module, x: Tensor) -> list[tuple[str, Tensor]]:
    """Return (name, output) of each module in the order in which they end, the network itself, "", last."""
    outputs: list[tuple[str, Tensor]] = []

    def record(module: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            outputs.append((names[module], out))

    names = {module: name for name, module in network.named_modules()}
    hooks = [module.register_forward_hook(record) for module in names]
    network(x)
    for hook in hooks:
        hook.remove()
    return outputs


def find_head(network: nn.Module, outputs: list[tuple[str, Tensor]], features: Tensor) -> tuple[str, bool]:
    """Return the linear layer that gives the logits from the average of `features`, or of their positive
    part (True); ("", False) when there is none."""
    logits = outputs[-1][1]
    for head, _ in reversed(outputs):
        linear = network.get_submodule(head)
        if isinstance(linear, nn.Linear) and linear.in_features == features.shape[1]:
            for rectified in (False, True):
                read = linear((F.relu(features) if rectified else features).mean((2, 3)))
                if read.shape == logits.shape and equal(read, logits):
                    return head, rectified
    return "", False


def symmetric_grid(network: nn.Module, layer: str, size: int, cells: int) -> tuple[int, int]:
    """Return (stride, remainder) of the image sizes at which a network's map is evenly spread.

    A strided convolution with padding sees pixels 0, 2, 4, ...: a ResNet's map of 96 pixels has its cells
    at 0, 32, 64, not at 16, 48, 80; of 97 pixels at 0, 32, 64, 96. At such a size a network with symmetric
    kernels gives the turned image's map turned. (1, 0), any size: none was found.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_((module.weight + module.weight.flip(2, 3)) / 2)
    stride = 2 ** math.floor(math.log2(size / (cells - 1)))
    for remainder in (0, 1):
        view = on_grid(size, stride, remainder)
        x = torch.randn(2, 3, view, view, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        try:
            upright, turned = (dict(outputs_of(network, image))[layer] for image in (x, x.flip(2, 3)))
        except (RuntimeError, AssertionError):  # a network of one size
            break
        if equal(channels_first(upright).flip(2, 3), channels_first(turned)):
            return stride, remainder
    return 1, 0


def on_grid(size: float, stride: int, remainder: int) -> int:
    """Return the size nearest to `size` that leaves `remainder` when divided by `stride`."""
    return max(1, round((size - remainder) / stride)) * stride + remainder


def equal(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-6 * a.abs().max())

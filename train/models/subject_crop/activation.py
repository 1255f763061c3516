"""Locates the subject where the classifier's own last feature map is active: no second network."""

import copy
import math
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve.contract.errors import UserError
from train.models.subject_crop.crop import Classifier, crop_and_resize, in_float32, whole

TAIL = 0.1  # share of the evidence that may lie outside the box, on each of its four sides
BACKGROUND = 0.01  # share of the evidence spread evenly: a map without any gives the whole image
SMALLEST_MAP = 3  # cells a side; from fewer no box can be told


class ActivationMap(nn.Module):
    """A locator of train.models.subject_crop.crop.SubjectCrop.

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
            threshold: share of the map's maximum below which a place is background.
            scale: side of the view that is looked at, as a share of the whole image's.
            grid: (stride, remainder) of the view's side; see `symmetric_grid`.
        """
        super().__init__()
        self.layer, self.head, self.rectified = layer, head, rectified
        self.threshold, self.scale, self.grid = threshold, scale, grid
        self.kept_head: nn.Linear | None = None
        """The linear layer, where the network has been cut short before it."""

    def forward(self, pixels: Tensor, classifier: Classifier) -> tuple[Tensor, Tensor]:
        """float32 [N, 3, P, P] of 0..255 -> boxes [N, 4], each the span of the evidence, and logits."""
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
        """[N, num_classes], [N, C, h, w] -> [N, h, w], not negative."""
        if not self.head:
            return features.square().mean(1)
        head = self.kept_head or network.get_submodule(self.head)
        assert isinstance(head, nn.Linear)
        logits = scores if self.kept_head is None else head(scores)
        maps = F.conv2d(F.relu(features) if self.rectified else features, head.weight[:, :, None, None])
        maps = F.relu(maps - maps.mean(1, keepdim=True))
        return (maps * logits.softmax(1)[:, :, None, None]).sum(1)


def box_of_map(evidence: Tensor, threshold: float) -> Tensor:
    """[N, h, w], not negative -> boxes [N, 4] around what exceeds `threshold` of each map's maximum."""
    largest = evidence.amax((1, 2), keepdim=True)
    excess = F.relu(evidence / (largest + 1e-12) - threshold)
    left, right = span(excess.sum(1))
    upper, lower = span(excess.sum(2))
    return torch.stack([left, upper, right, lower], 1)


def span(mass: Tensor) -> tuple[Tensor, Tensor]:
    """[N, cells] along an axis -> where TAIL and 1 - TAIL of the mass lie, each [N], in 0..1.

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
    """[N, h, w, C] of square maps, which some transformers have, -> [N, C, h, w]."""
    _, a, b, c = features.shape
    return features.permute(0, 3, 1, 2) if a == b != c else features


@torch.no_grad()
def find_activation_map(
    network: nn.Module, name: str, size: int, threshold: float, scale: float
) -> ActivationMap:
    """The last feature map of a network that is given images of `size` pixels, and the linear layer that
    reads it where global average pooling alone is between them.

    Raises:
        UserError: there is no such map, or it is too small to tell where the subject is.
    """
    probe = copy.deepcopy(network).double().eval()  # exact enough to tell equal from nearly equal
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
            f"--subject_crop cam: {name} has no feature map of {SMALLEST_MAP} cells a side at {size} "
            "pixels; use a convolutional network, larger images, or --subject_crop detector"
        )
    layer, features = maps[-1]
    head, rectified = find_head(probe, outputs, features)
    grid = symmetric_grid(probe, layer, size, features.shape[2])
    return ActivationMap(layer, head, rectified, threshold, scale, grid)


def outputs_of(network: nn.Module, x: Tensor) -> list[tuple[str, Tensor]]:
    """(name, output) of each module in the order in which they end; the network itself, "", is last."""
    outputs: list[tuple[str, Tensor]] = []

    def note(module: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            outputs.append((names[module], out))

    names = {module: name for name, module in network.named_modules()}
    hooks = [module.register_forward_hook(note) for module in names]
    network(x)
    for hook in hooks:
        hook.remove()
    return outputs


def find_head(network: nn.Module, outputs: list[tuple[str, Tensor]], features: Tensor) -> tuple[str, bool]:
    """The linear layer that gives the logits from the average of `features` or of their positive part
    (True); ("", False) when there is none."""
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
    """(stride, remainder) of the image sizes at which a network's map is evenly spread over the image.

    A strided convolution with padding looks at pixels 0, 2, 4, ...: of an even number it leaves out the
    last, so that a ResNet's map of 96 pixels is of the places 0, 32, 64, not 16, 48, 80; of 97 pixels it is
    of 0, 32, 64, 96. At such a size a network with symmetric kernels gives the turned image's map turned.
    (1, 0) means any size: no such one was found.
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
    """The size nearest to `size` that leaves `remainder`."""
    return max(1, round((size - remainder) / stride)) * stride + remainder


def equal(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-6 * a.abs().max())

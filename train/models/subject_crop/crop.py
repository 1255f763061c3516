"""Subject first: find what an image shows, cut it out, and classify that. Tensor operations alone, so that
the same stage is trained, exported and served.

Every step is a continuous function of the pixels: a box that jumped where two scores tie would let
PyTorch and onnxruntime, which round differently, give different answers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(Protocol):
    """What this stage asks of train.models.classifier.ImageClassifier."""

    network: nn.Module

    def score(self, pixels: Tensor) -> Tensor:
        """float32 [N, 3, H, W] of 0..255 -> logits."""


class SubjectCrop(nn.Module):
    """Cuts a square around the subject out of images that are `zoom` times as large as the network's input.

    The square holds the box that the locator gives and `margin` of its longer side around it. It is never
    smaller than the network's input, so that nothing is enlarged, and lies within the image. While `active`
    is False (the first epochs of a classifier that has yet to learn where to look) it is the whole image.
    """

    def __init__(self, locator: nn.Module, zoom: float, margin: float, average: bool):
        """
        Args:
            locator: (images float32 [N, 3, P, P] of 0..255, classifier) -> boxes [N, 4], and the logits of
                the whole images where it came upon them, else None.
            average: evaluation averages the logits of crop and whole image, and training shows the one of
                every second image, the other of the rest.
        """
        super().__init__()
        self.locator, self.zoom, self.margin, self.average = locator, zoom, margin, average
        self.active = True

    def keep_head(self, head: nn.Linear) -> None:
        """The network has been cut short before its last linear layer: `classifier.score` gives what that
        would see, and so does `evaluate`."""
        self.locator.kept_head = head

    def size(self, pixels: Tensor) -> int:
        """Height and width of the network's input for these images."""
        return round(pixels.shape[-1] / self.zoom)

    def locate(self, pixels: Tensor, classifier: Classifier) -> tuple[Tensor, Tensor | None]:
        """float32 [N, 3, P, P] of 0..255 -> the squares [N, 4] (left, upper, right, lower, in shares of the
        side), and the logits of the whole images where the locator came upon them."""
        if not self.active:
            return whole(pixels), None
        boxes, logits = self.locator(pixels, classifier)
        return square(boxes, self.margin, 1 / self.zoom), logits

    def evaluate(self, pixels: Tensor, classifier: Classifier) -> Tensor:
        """float32 [N, 3, P, P] of 0..255 -> logits, in evaluation mode."""
        boxes, seen = self.locate(pixels, classifier)
        logits = classifier.score(crop_and_resize(pixels, boxes, self.size(pixels)))
        if not (self.average and self.active):
            return logits
        if seen is None:
            seen = classifier.score(crop_and_resize(pixels, whole(pixels), self.size(pixels)))
        return (logits + seen) / 2

    def forward(self, pixels: Tensor, classifier: Classifier) -> Tensor:
        """What the network is trained on: float32 [N, 3, P, P] of 0..255 -> [N, 3, P / zoom, P / zoom]."""
        boxes = whole(pixels).clone()
        if self.active:
            cut = slice(1, None, 2) if self.average else slice(None)
            with looking(classifier.network, pixels.device.type):
                boxes[cut] = self.locate(pixels[cut], classifier)[0].float()
        return crop_and_resize(pixels, boxes, self.size(pixels))


@contextmanager
def looking(network: nn.Module, device: str) -> Iterator[None]:
    """A forward pass inside trains nothing: no gradients, evaluation mode (batch-norm statistics stay as
    they are), each module's own mode afterwards."""
    training = [module for module in network.modules() if module.training]
    # else autocast keeps the weights that it casts here, without gradients, and training then uses those
    uncached = torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False)
    network.eval()
    try:
        with torch.no_grad(), uncached:
            yield
    finally:
        for module in training:
            module.training = True


def square(boxes: Tensor, margin: float, smallest: float) -> Tensor:
    """The squares around boxes [N, 4] with a margin on each side, at least `smallest`, within the image."""
    lower, upper = boxes[:, :2], boxes[:, 2:]
    side = (upper - lower).amax(1, keepdim=True) * (1 + 2 * margin)
    half = side.clamp(smallest, 1.0) / 2
    centre = torch.minimum(torch.maximum((lower + upper) / 2, half), 1 - half)
    return torch.cat([centre - half, centre + half], 1)


def whole(pixels: Tensor) -> Tensor:
    """Boxes [N, 4] that hold the whole image."""
    return pixels.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(pixels.shape[0], 4)


def crop_and_resize(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """float32 [N, 3, H, W] and boxes [N, 4] in shares of the sides -> [N, 3, size, size], antialiased.

    Equals Pillow's bilinear resize of the box, which rounds to whole grey levels twice, to within one.
    """
    with in_float32(pixels):
        height, width = pixels.shape[2:]
        rows = interpolation(boxes[:, 1], boxes[:, 3], height, size)
        columns = interpolation(boxes[:, 0], boxes[:, 2], width, size)
        return rows[:, None] @ pixels @ columns[:, None].transpose(2, 3)


def interpolation(start: Tensor, end: Tensor, length: int, size: int) -> Tensor:
    """Weights [N, size, length] of a triangle filter as wide as the reduction, for the intervals `start` to
    `end`, each [N] in shares of `length`. Source: Pillow's Resample.c."""
    step = (end - start)[:, None] * (length / size)
    places = torch.arange(size, dtype=start.dtype, device=start.device) + 0.5
    centres = start[:, None] * length + step * places
    cells = torch.arange(length, dtype=start.dtype, device=start.device) + 0.5
    distance = (cells - centres[:, :, None]).abs() / step.clamp(min=1.0)[:, :, None]
    weights = F.relu(1 - distance)
    return weights / weights.sum(2, keepdim=True)


def in_float32(pixels: Tensor) -> torch.autocast:
    """Boxes and pixels keep float32 also where the network computes in bf16, which blurs 256 grey levels.
    TF32, which CUDA may use for their matrix products, moves a pixel by a fifth of a grey level at most."""
    return torch.autocast(pixels.device.type, enabled=False)

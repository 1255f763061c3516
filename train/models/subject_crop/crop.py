"""Crop around the subject of an image, of tensor operations alone: trained, exported and served alike.

Every step is a continuous function of the pixels: a box that jumped where two scores tie would let
PyTorch and onnxruntime, which round differently, give different answers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # it imports this module
    from train.models.classifier import ImageClassifier


class SubjectCrop(nn.Module):
    """Square around the subject, cut out of images that are `zoom` times as large as the network's input.

    It holds the locator's box and `margin` of its longer side on each side, lies within the image, and is
    never smaller than the network's input, so that nothing is enlarged. While `active` is False (a
    classifier's first epochs, in which its activation tells nothing) it is the whole image.
    """

    def __init__(self, locator: nn.Module, zoom: float, margin: float, average: bool):
        """`locator`: (images float32 [N, 3, P, P] of 0..255, classifier) -> boxes [N, 4], and the logits of
        the whole images if it computes them, else None. `average`: average the logits of crop and whole
        image in evaluation; crop every second image in training."""
        super().__init__()
        self.locator, self.zoom, self.margin, self.average = locator, zoom, margin, average
        self.active = True

    def keep_head(self, head: nn.Linear) -> None:
        """Give the locator the last linear layer of a network that ends before it: `classifier.score` and
        `evaluate` then return the layer's input."""
        self.locator.kept_head = head

    def size(self, pixels: Tensor) -> int:
        """Return height and width of the network's input for these images."""
        return round(pixels.shape[-1] / self.zoom)

    def locate(self, pixels: Tensor, classifier: "ImageClassifier") -> tuple[Tensor, Tensor | None]:
        """Return the squares [N, 4] (left, upper, right, lower, in shares of the side) of float32
        [N, 3, P, P] of 0..255, and the locator's logits of the whole images, if any."""
        if not self.active:
            return whole(pixels), None
        boxes, logits = self.locator(pixels, classifier)
        return square(boxes, self.margin, 1 / self.zoom), logits

    def evaluate(self, pixels: Tensor, classifier: "ImageClassifier") -> Tensor:
        """Return the logits in evaluation mode of float32 [N, 3, P, P] of 0..255."""
        boxes, seen = self.locate(pixels, classifier)
        logits = classifier.score(crop_and_resize(pixels, boxes, self.size(pixels)))
        if not (self.average and self.active):
            return logits
        if seen is None:
            seen = classifier.score(crop_and_resize(pixels, whole(pixels), self.size(pixels)))
        return (logits + seen) / 2

    def forward(self, pixels: Tensor, classifier: "ImageClassifier") -> Tensor:
        """Return the images to train on, [N, 3, P / zoom, P / zoom], of float32 [N, 3, P, P] of 0..255."""
        boxes = whole(pixels).clone()
        if self.active:
            cut = slice(1, None, 2) if self.average else slice(None)
            with untrained(classifier.network, pixels.device.type):
                boxes[cut] = self.locate(pixels[cut], classifier)[0].float()
        return crop_and_resize(pixels, boxes, self.size(pixels))


@contextmanager
def untrained(network: nn.Module, device: str) -> Iterator[None]:
    """Run the network in evaluation mode and without gradients, and restore each module's mode."""
    training = [module for module in network.modules() if module.training]
    # autocast would cache the weights that it casts here, without gradients, and training would use those
    uncached = torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False)
    network.eval()
    try:
        with torch.no_grad(), uncached:
            yield
    finally:
        for module in training:
            module.training = True


def square(boxes: Tensor, margin: float, smallest: float) -> Tensor:
    """Return squares around boxes [N, 4] with a margin on each side, at least `smallest`, in the image."""
    lower, upper = boxes[:, :2], boxes[:, 2:]
    side = (upper - lower).amax(1, keepdim=True) * (1 + 2 * margin)
    half = side.clamp(smallest, 1.0) / 2
    centre = torch.minimum(torch.maximum((lower + upper) / 2, half), 1 - half)
    return torch.cat([centre - half, centre + half], 1)


def whole(pixels: Tensor) -> Tensor:
    """Return boxes [N, 4] of the whole image."""
    # of numbers made on the device: a copy from the host would wait for it
    box = torch.cat([pixels.new_zeros(2), pixels.new_ones(2)])
    return box.expand(pixels.shape[0], 4)


def crop_and_resize(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Return [N, 3, size, size], antialiased, of boxes [N, 4] (shares of sides) in float32 [N, 3, H, W].

    Differs from Pillow's bilinear resize of the box by at most the one grey level that Pillow rounds away.
    """
    with in_float32(pixels):
        height, width = pixels.shape[2:]
        rows = interpolation(boxes[:, 1], boxes[:, 3], height, size)
        columns = interpolation(boxes[:, 0], boxes[:, 2], width, size)
        return rows[:, None] @ pixels @ columns[:, None].transpose(2, 3)


def triangle(distance: Tensor) -> Tensor:
    """Return the weights of bilinear interpolation."""
    return F.relu(1 - distance)


def interpolation(
    start: Tensor,
    end: Tensor,
    length: int,
    size: int,
    kernel: Callable[[Tensor], Tensor] = triangle,
    used: Tensor | None = None,
) -> Tensor:
    """Return weights [N, size, length] of a filter as wide as the reduction, for intervals from `start` to
    `end`, each [N] in shares of `length`. Source: Pillow's Resample.c.

    Args:
        kernel: distances, not negative -> weights.
        used: [N] number of cells, from the first one on, that exist.
    """
    step = (end - start)[:, None] * (length / size)
    positions = torch.arange(size, dtype=start.dtype, device=start.device) + 0.5
    centres = start[:, None] * length + step * positions
    cells = torch.arange(length, dtype=start.dtype, device=start.device) + 0.5
    distance = (cells - centres[:, :, None]).abs() / step.clamp(min=1.0)[:, :, None]
    weights = kernel(distance)
    if used is not None:
        weights = weights * (cells < used[:, None])[:, None]
    return weights / weights.sum(2, keepdim=True)


def in_float32(pixels: Tensor) -> torch.autocast:
    """Keep boxes and pixels in float32 under autocast: bf16 blurs 256 grey levels, CUDA's TF32 moves a
    pixel by a fifth of one at most."""
    return torch.autocast(pixels.device.type, enabled=False)

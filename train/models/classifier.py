"""The module that is trained, exported and verified: uint8 pixels in, logits out, normalisation inside."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from train.models.layers import freeze
from train.models.subject_crop.crop import SubjectCrop

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Outputs:
    """Logits of a network in training, and those of heads that only training has (GoogLeNet, Inception)."""

    logits: Tensor
    auxiliary: tuple[Tensor, ...] = ()


class ImageClassifier(nn.Module):
    """A network behind its normalisation: uint8 pixels [N, H, W, 3] -> logits float32 [N, num_classes].

    Mean and standard deviation are buffers, so no caller can forget them. In evaluation mode the logits are
    averaged with the mirror image's when `flip_tta` is set, and divided by `temperature`. With `subject`,
    the network sees the crop that it makes of each image.
    """

    mean: Tensor
    std: Tensor
    temperature: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ):
        super().__init__()
        self.network = network
        self.channels_last = False
        self.flip_tta = False
        self.subject: SubjectCrop | None = None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)
        self.register_buffer("temperature", torch.ones(()))
        self.frozen: tuple[str, ...] = ()
        """Paths in `network` of modules that stay in eval mode while the rest is trained."""

    def forward(self, images: Tensor) -> Any:
        """Return logits; in training mode `Outputs` for networks with auxiliary heads."""
        pixels = images.permute(0, 3, 1, 2).float()  # bytes arrive in channels_last order already
        if not self.training:
            logits = self.score(pixels) if self.subject is None else self.subject.evaluate(pixels, self)
            return logits / self.temperature
        if self.subject is not None:
            pixels = self.subject(pixels, self)
        out = self.network(self.normalise(pixels))
        if isinstance(out, Tensor):
            return out.float()
        logits, *auxiliary = out  # torchvision's GoogLeNetOutputs and InceptionOutputs are tuples
        return Outputs(logits.float(), tuple(a.float() for a in auxiliary if a is not None))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return the network's input for float32 [N, 3, H, W] of 0..255."""
        x = (pixels - self.mean) / self.std
        return x if self.channels_last else x.contiguous()

    def score(self, pixels: Tensor) -> Tensor:
        """Return the network's logits in evaluation mode for float32 [N, 3, H, W] of 0..255."""
        x = self.normalise(pixels)
        logits: Tensor = self.network(x).float()
        if self.flip_tta and not self.training:
            mirrored: Tensor = self.network(x.flip(3)).float()
            logits = (logits + mirrored) / 2
        return logits

    @property
    def zoom(self) -> float:
        """Side of the images as a multiple of the network's input."""
        return 1.0 if self.subject is None else self.subject.zoom

    def locate(self, images: Tensor) -> Tensor:
        """Return the square that is cut out of each image of uint8 [N, H, W, 3]: float32 [N, 4], left,
        upper, right, lower, in shares of the side."""
        assert self.subject is not None
        return self.subject.locate(images.permute(0, 3, 1, 2).float(), self)[0]

    def freeze(self, groups: int) -> str:
        """Fix the first layer groups (-1: all but the head) and their batch-norm statistics; return a note.
        Raises UserError if nothing would be left to train."""
        self.frozen, last = freeze(self.network, groups)
        self.train(self.training)
        total = sum(p.numel() for p in self.parameters())
        fixed = sum(p.numel() for p in self.parameters() if not p.requires_grad)
        return f"frozen: {fixed:,} of {total:,} parameters, up to {last}"

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for path in self.frozen:
            self.network.get_submodule(path).eval()
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights, also from plain dictionaries, which lack the version that torchvision's MNASNet
        asks for."""
        versioned = OrderedDict(state_dict)
        versioned._metadata = self.state_dict()._metadata  # type: ignore[attr-defined]
        return super().load_state_dict(versioned, strict, assign)


def probabilities(logits: Tensor, clip: float) -> Tensor:
    """Return softmax with no value below `clip` and rows that sum to 1, as
    `evaluation.calibration.log_probabilities` does."""
    values = logits.softmax(dim=1)
    if clip:
        values = clip + (1 - clip * logits.shape[1]) * values
    return values

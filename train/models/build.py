"""Classifiers built by name with their weights, rebuilt from a checkpoint, or loaded as a teacher."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import nn

from serve.contract.errors import UserError
from train.checkpoint import best_checkpoint, load_checkpoint
from train.models.classifier import ImageClassifier
from train.models.input_settings import input_settings
from train.models.pretrained import download_weights, read_weights
from train.models.subject_crop.build import add_subject_crop
from train.models.transfer import transfer
from train.models.zoo import create, set_drop_path, set_dropout


def build_model(
    name: str,
    num_classes: int,
    image_size: int = 224,
    weights: str = "",
    dropout: float | None = None,
    drop_path: float | None = None,
    class_names: Sequence[str] = (),
) -> tuple[ImageClassifier, list[str]]:
    """Return a classifier with the normalisation of its weights, and notes on what was loaded.

    Raises UserError for an unknown name, weights that do not fit or cannot be read, and a network that
    cannot take images of this size.
    """
    content = read_weights(name, weights)
    settings = input_settings(name, weights, content)
    notes = []
    if weights == "default":
        network, note = download_weights(name, num_classes, image_size, drop_path)
        notes.append(note)
    else:
        try:
            network = create(name, num_classes, image_size, drop_path=drop_path)
        except (RuntimeError, AssertionError) as error:  # some refuse a size when they are built
            raise _wrong_size(name, image_size, error) from error
    if weights not in ("", "default"):
        notes.append(transfer(network, name, content, weights, class_names))
    if dropout is not None and not set_dropout(network, dropout):
        notes.append(f"warning: {name} has no dropout layers, --dropout {dropout:g} changes nothing")
    if drop_path is not None and not set_drop_path(network, drop_path) and drop_path:
        notes.append(f"warning: {name} has no stochastic depth, --drop-path {drop_path:g} changes nothing")
    model = ImageClassifier(network, settings.mean, settings.std)
    try_forward(model, name, num_classes, image_size)
    return model, notes


def rebuild(checkpoint: dict[str, Any]) -> ImageClassifier:
    """Return a classifier with a checkpoint's evaluated weights (the moving average if there is one), in
    eval mode, on the CPU."""
    config = checkpoint["config"]
    model, _ = build_model(
        config["model"], len(checkpoint["class_names"]), config["image_size"], dropout=config["dropout"]
    )
    model.flip_tta = config["flip_tta"]
    weights = checkpoint["ema"] or checkpoint["model"]
    add_subject_crop(model, config, checkpoint["preprocess"]["size"], weights)
    if model.subject is not None:
        model.subject.active = checkpoint["crops_subject"]
    model.load_state_dict(weights)
    return model.eval()


def load_teacher(run: str, class_names: tuple[str, ...], zoom: float = 1.0) -> ImageClassifier | None:
    """Return the best checkpoint of another run, or None without a name. `zoom` is the student's. Raises
    UserError if there is no such run, or its classes or the size of its images differ."""
    if not run:
        return None
    checkpoint = load_checkpoint(best_checkpoint(run))
    if list(checkpoint["class_names"]) != list(class_names):
        raise UserError(
            f"--teacher {run!r} has the classes {checkpoint['class_names']}, the data have {class_names}"
        )
    teacher = rebuild(checkpoint)
    if teacher.zoom != zoom:
        raise UserError(
            f"--teacher {run!r} takes images of {teacher.zoom:g} times its network's input, this run of "
            f"{zoom:g} times: give both the same --subject-zoom, or no --subject-crop"
        )
    teacher.requires_grad_(False)
    return teacher


@torch.no_grad()
def try_forward(model: ImageClassifier, name: str, num_classes: int, image_size: int) -> None:
    """Raise UserError if the model cannot take images of `image_size` pixels, or is no classifier; leave it
    in training mode."""
    model.eval()
    images = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    try:
        logits = model(images)
        if getattr(model.network, "aux_logits", False):  # heads that only training has need size too
            copy.deepcopy(model).train()(images)
        _check_patches(model.network, round(image_size / model.zoom))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _wrong_size(name, image_size, error) from error
    finally:
        model.train()
    if logits.shape != (2, num_classes):
        raise UserError(
            f"{name} is no classifier: for 2 images and {num_classes} classes it returns "
            f"{list(logits.shape)}; give another --model"
        )


def _wrong_size(name: str, image_size: int, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{name} cannot take images of {image_size} pixels: {reason}")


def _check_patches(network: nn.Module, size: int) -> None:
    """Raise UserError when a transformer of timm would not see the last rows and columns."""
    embedding = getattr(network, "patch_embed", None) or getattr(network, "stem", None)  # mixers'
    if not isinstance(embedding, PatchEmbed) or embedding.dynamic_img_pad:
        return
    for patch in embedding.patch_size:
        if size % patch:
            fitting = size // patch * patch
            raise UserError(
                f"its patches of {patch} pixels leave out the last {size % patch}; give {fitting} or "
                f"{fitting + patch}"
            )

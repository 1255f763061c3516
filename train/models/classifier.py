"""Networks by name, as one module that takes pixels: uint8 in, logits out, normalisation inside."""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from serve.contract.errors import UserError
from train.checkpoint import best_checkpoint, load_checkpoint
from train.models.layers import freeze
from train.models.pretrained import download, input_settings, read_file, read_weights
from train.models.subject_crop.activation import ActivationMap, find_activation_map
from train.models.subject_crop.crop import SubjectCrop
from train.models.subject_crop.detector import DetectedSubject, build_detector
from train.models.transfer import tensors_of, transfer
from train.models.zoo import create, set_drop_path, set_dropout

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Outputs:
    logits: Tensor
    auxiliary: tuple[Tensor, ...] = ()
    """Logits of heads that only training has (GoogLeNet, Inception)."""


class ImageClassifier(nn.Module):
    """What is trained, exported and verified: uint8 pixels [N, H, W, 3] -> logits float32 [N, num_classes].

    Mean and standard deviation are buffers of the module, so no caller can forget them. In eval mode the
    logits are averaged with the mirror image's when `flip_tta` is set, and divided by `temperature`.
    With `subject` the network sees what that cuts out of the images.
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
        """Returns logits; while training, `Outputs` for networks with auxiliary heads."""
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
        """float32 [N, 3, H, W] of 0..255 -> the network's input."""
        x = (pixels - self.mean) / self.std
        return x if self.channels_last else x.contiguous()

    def score(self, pixels: Tensor) -> Tensor:
        """float32 [N, 3, H, W] of 0..255 -> logits of the network in evaluation mode."""
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
        """uint8 [N, H, W, 3] -> the square that is cut out of each image, float32 [N, 4]: left, upper,
        right, lower, in shares of the side."""
        assert self.subject is not None
        return self.subject.locate(images.permute(0, 3, 1, 2).float(), self)[0]

    def freeze(self, groups: int) -> str:
        """Fix the first layer groups, -1: all but the head, with their batch-norm statistics.

        Returns a note.

        Raises:
            UserError: nothing would be left to train.
        """
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
        """Also from plain dictionaries: torchvision's MNASNet asks for a version, which they lack."""
        versioned = OrderedDict(state_dict)
        versioned._metadata = self.state_dict()._metadata  # type: ignore[attr-defined]
        return super().load_state_dict(versioned, strict, assign)


def probabilities(logits: Tensor, clip: float) -> Tensor:
    """Softmax, no value below `clip`, rows summing to 1: see `evaluation.calibration.log_probabilities`."""
    values = logits.softmax(dim=1)
    if clip:
        values = clip + (1 - clip * logits.shape[1]) * values
    return values


def build_model(
    name: str,
    num_classes: int,
    image_size: int = 224,
    weights: str = "",
    dropout: float | None = None,
    drop_path: float | None = None,
    class_names: Sequence[str] = (),
) -> tuple[ImageClassifier, list[str]]:
    """A network for `num_classes`, and notes on what was loaded. The normalisation is the weights' own.

    Raises:
        UserError: unknown name (the closest ones are suggested), weights that do not fit or cannot be
            had, or a network that cannot take images of this size.
    """
    content = read_weights(name, weights)
    settings = input_settings(name, weights, content)
    notes = []
    if weights == "default":
        network, note = download(name, num_classes, image_size, drop_path)
        notes.append(note)
    else:
        try:
            network = create(name, num_classes, image_size, drop_path=drop_path)
        except (RuntimeError, AssertionError) as error:  # some refuse a size when they are built
            raise cannot_take(name, image_size, error) from error
    if content:
        notes.append(transfer(network, name, content, weights, class_names))
    if dropout is not None and not set_dropout(network, dropout):
        notes.append(f"warning: {name} has no dropout layers, --dropout {dropout:g} changes nothing")
    if drop_path is not None and not set_drop_path(network, drop_path) and drop_path:
        notes.append(f"warning: {name} has no stochastic depth, --drop_path {drop_path:g} changes nothing")
    model = ImageClassifier(network, settings.mean, settings.std)
    try_forward(model, name, num_classes, image_size)
    return model, notes


def add_subject_crop(
    model: ImageClassifier,
    config: Mapping[str, Any],
    size: int,
    weights: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Put the stage of subject_crop/ that the settings ask for before the network; returns notes.

    Args:
        config: settings of TrainConfig by name.
        size: height and width of the images that are evaluated.
        weights: of a whole ImageClassifier, to take a detector's from; None: read --crop_detector.

    Raises:
        UserError: this network or this detector cannot do it.
    """
    if config["subject_crop"] == "none":
        return []
    locator: ActivationMap | DetectedSubject
    if config["subject_crop"] == "cam":
        scale = min(1, config["cam_zoom"] / config["subject_zoom"])
        name, threshold = config["model"], config["cam_threshold"]
        locator = find_activation_map(model.network, name, round(scale * size), threshold, scale)
        note = f"subject crop by {'class activation' if locator.head else 'energy'} of {locator.layer}"
    else:
        source, prefix = config["crop_detector"], "subject.locator.detector."
        if weights is None:
            state = tensors_of(read_file(source, "--crop_detector"))
        else:
            state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        detector, architecture = build_detector(state, source)
        classes = [int(number) for number in config["crop_classes"].split(",") if number]
        locator = DetectedSubject(detector, classes, config["crop_min_score"])
        megabytes = sum(4 * p.numel() for p in detector.parameters()) / 1e6
        note = f"subject crop by {architecture}, {megabytes:.1f} MB in every checkpoint and model file"
    zoom, margin, average = (config[f"subject_{name}"] for name in ("zoom", "margin", "average"))
    model.subject = SubjectCrop(locator, zoom, margin, average)
    return [note]


def rebuild(checkpoint: dict[str, Any]) -> ImageClassifier:
    """A checkpoint's evaluated weights (the moving average if there is one), in eval mode, on the CPU."""
    config = checkpoint["config"]
    model, _ = build_model(
        config["model"], len(checkpoint["class_names"]), config["image_size"], dropout=config["dropout"]
    )
    model.flip_tta = config["flip_tta"]
    weights = checkpoint["ema"] or checkpoint["model"]
    if config.get("subject_crop", "none") != "none":
        add_subject_crop(model, config, checkpoint["preprocess"]["size"], weights)
        assert model.subject is not None
        model.subject.active = checkpoint["crops_subject"]
    model.load_state_dict(weights)
    return model.eval()


def load_teacher(run: str, class_names: tuple[str, ...], zoom: float = 1.0) -> ImageClassifier | None:
    """The best checkpoint of another run of the same classes; none without a name. `zoom` is the student's.

    Raises:
        UserError: no such run, or it knows other classes, or takes images of another size.
    """
    if not run:
        return None
    checkpoint = load_checkpoint(best_checkpoint(run))
    if list(checkpoint["class_names"]) != list(class_names):
        raise UserError(
            f"--teacher {run!r} knows the classes {checkpoint['class_names']}, the data have {class_names}"
        )
    teacher = rebuild(checkpoint)
    if teacher.zoom != zoom:
        raise UserError(
            f"--teacher {run!r} takes images {teacher.zoom:g} times its network's input, this run {zoom:g} "
            "times: it would see the wrong size; give both the same --subject_zoom, or no --subject_crop"
        )
    teacher.requires_grad_(False)
    return teacher


@torch.no_grad()
def try_forward(model: ImageClassifier, name: str, num_classes: int, image_size: int) -> None:
    """Raises UserError when the network cannot take images of this size."""
    model.eval()
    images = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    try:
        logits = model(images)
        if getattr(model.network, "aux_logits", False):  # heads that only training has need size too
            copy.deepcopy(model).train()(images)
        check_patches(model.network, round(image_size / model.zoom))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise cannot_take(name, image_size, error) from error
    finally:
        model.train()
    assert logits.shape == (2, num_classes), logits.shape


def cannot_take(name: str, image_size: int, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{name} cannot take images of {image_size} pixels: {reason}")


def check_patches(network: nn.Module, size: int) -> None:
    """Raises UserError when a transformer of timm would never see the last rows and columns."""
    embedding = getattr(network, "patch_embed", None)
    if not isinstance(embedding, PatchEmbed) or embedding.dynamic_img_pad:
        return
    for patch in embedding.patch_size:
        if size % patch:
            lower = size // patch * patch
            raise UserError(
                f"it sees squares of {patch} pixels, and never the last {size % patch}; take {lower} or "
                f"{lower + patch}"
            )

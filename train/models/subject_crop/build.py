"""The subject crop that the settings describe, put before a classifier's network."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from train.models.classifier import ImageClassifier
from train.models.pretrained import read_file
from train.models.state_dict import select_state, tensors_of
from train.models.subject_crop.activation import ActivationMap, find_activation_map
from train.models.subject_crop.crop import SubjectCrop
from train.models.subject_crop.detector import DetectedSubject, build_detector


def add_subject_crop(
    model: ImageClassifier,
    config: Mapping[str, Any],
    size: int,
    weights: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Put a subject crop before the network, unless --subject-crop is none; return notes.

    Args:
        config: settings under their names in TrainConfig.
        size: height and width of the images that are evaluated.
        weights: of a whole ImageClassifier, to take a detector's from; None: read --crop-detector.

    Raises:
        UserError: this network or this detector cannot do it.
    """
    if config["subject_crop"] == "none":
        return []
    locator: ActivationMap | DetectedSubject
    if config["subject_crop"] == "cam":
        scale = min(1, config["cam_zoom"] / config["subject_zoom"])
        locator = find_activation_map(
            model.network, config["model"], round(scale * size), config["cam_threshold"], scale
        )
        note = f"subject crop by {'class activation' if locator.head else 'energy'} of {locator.layer}"
    else:
        source, prefix = config["crop_detector"], "subject.locator.detector."
        if weights is None:
            found, _, _ = select_state(read_file(source, "--crop-detector"))
            state = {k.removeprefix("module."): v for k, v in tensors_of(found).items()}
        else:
            state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        detector, architecture = build_detector(state, source)
        classes = [int(number) for number in config["crop_classes"].split(",") if number]
        locator = DetectedSubject(detector, classes, config["crop_min_score"])
        megabytes = sum(4 * p.numel() for p in detector.parameters()) / 1e6
        note = f"subject crop by {architecture}, {megabytes:.1f} MB in every checkpoint and model file"
    model.subject = SubjectCrop(
        locator, config["subject_zoom"], config["subject_margin"], config["subject_average"]
    )
    return [note]

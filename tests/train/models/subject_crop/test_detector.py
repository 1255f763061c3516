"""A detector as the locator: torchvision's own boxes, recognised by its file alone, frozen."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectors import SSDLITE, detector
from test_crop import pixels
from torch import Tensor
from torchvision.models import detection

from train.config import TrainConfig
from train.models.build import build_model
from train.models.classifier import ImageClassifier
from train.models.subject_crop.build import add_subject_crop
from train.models.subject_crop.detector import DetectedSubject, best_box, build_detector
from train.optim.optimizers import build_optimizer

SETTINGS = TrainConfig(
    model="simple_cnn", image_size=32, subject_crop="detector", crop_detector="detector.pt"
)


@pytest.fixture(scope="module")
def ssdlite() -> Any:
    return detector()


# what the detector sees


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (SSDLITE, {}),
        pytest.param("ssd300_vgg16", {}, marks=pytest.mark.slow),
        pytest.param("retinanet_resnet50_fpn", {"min_size": 96}, marks=pytest.mark.slow),
        pytest.param("retinanet_resnet50_fpn_v2", {"min_size": 96}, marks=pytest.mark.slow),
        ("fcos_resnet50_fpn", {"min_size": 96}),
    ],
)
def test_the_best_box_is_that_of_torchvisions_model(name: str, options: dict[str, int]) -> None:
    network = detector(name, **options)
    images = pixels(80, 2).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        scores, boxes = DetectedSubject(network, [], 0.0).detect(images)
        expected = network(list(images / 255))
    for score, box, theirs in zip(scores, boxes, expected, strict=True):
        torch.testing.assert_close(score.max(), theirs["scores"][0], atol=1e-5, rtol=1e-4)
        best = box[score.argmax()] * 80
        torch.testing.assert_close(best, theirs["boxes"][0], atol=0.02, rtol=1e-3)


def test_only_the_given_classes_count(ssdlite: Any) -> None:
    images = pixels(80, 2).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = ssdlite(list(images / 255))
        scores, boxes = DetectedSubject(ssdlite, [2], 0.0).detect(images)
    for score, box, theirs in zip(scores, boxes, expected, strict=True):
        first = int((theirs["labels"] == 2).nonzero()[0])
        torch.testing.assert_close(score.max(), theirs["scores"][first], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(box[score.argmax()] * 80, theirs["boxes"][first], atol=0.02, rtol=1e-3)


def known_detector(network: Any, level: int, logit: float) -> Any:
    """All scores are those of the background, but for one anchor of one level with one cell."""
    network = copy.deepcopy(network)
    for head in (network.head.classification_head, network.head.regression_head):
        for block in head.module_list:
            block[1].weight.data.zero_()
            block[1].bias.data.zero_()
    for block in network.head.classification_head.module_list:
        block[1].bias.data.view(-1, 4)[:, 0] = 20.0  # background
    network.head.classification_head.module_list[level][1].bias.data.view(-1, 4)[2, 1] = 20.0 + logit
    return network


@pytest.mark.parametrize("logit", [5.0, -5.0])
def test_a_detector_whose_best_anchor_is_known(ssdlite: Any, logit: float) -> None:
    """The third default box of the last level has aspect ratio 2; unsure, the whole image is seen."""
    locator = DetectedSubject(known_detector(ssdlite, 5, logit), [1], 0.5)
    with torch.no_grad():
        box, logits = locator(pixels(64, 1).permute(0, 3, 1, 2).float(), None)
    assert logits is None
    width, height = 0.95 * 2**0.5, 0.95 / 2**0.5
    expected = [max(0, 0.5 - width / 2), 0.5 - height / 2, min(1, 0.5 + width / 2), 0.5 + height / 2]
    assert box[0].tolist() == pytest.approx(expected if logit > 0 else [0, 0, 1, 1], abs=1e-4)


BOXES = torch.tensor([[[0.1, 0.1, 0.3, 0.4], [0.12, 0.1, 0.3, 0.4], [0.6, 0.5, 0.9, 0.9]]])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.9, 0.5, 0.2], [0.1, 0.1, 0.3, 0.4]),
        ([0.5, 0.5, 0.9], [0.6, 0.5, 0.9, 0.9]),
        ([0.9, 0.1, 0.9], [0.1, 0.1, 0.9, 0.9]),  # two subjects: the box around both
        ([0.2, 0.1, 0.25], [0.0, 0.0, 1.0, 1.0]),  # nothing certain: the whole image
        ([0.35, 0.1, 0.1], [0.05, 0.05, 0.65, 0.7]),  # halfway
        ([0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]),
    ],
)
def test_best_box(scores: list[float], expected: list[float]) -> None:
    assert best_box(torch.tensor([scores]), BOXES, 0.3)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_best_box_does_not_jump_where_scores_tie_or_reach_the_threshold() -> None:
    steps = torch.linspace(0, 1, 2001)
    scores = torch.stack([torch.full_like(steps, 0.5), 0.2 * steps, steps], 1)
    boxes = best_box(scores, BOXES.expand(len(steps), 3, 4), 0.3)
    assert (boxes[1:] - boxes[:-1]).abs().max() < 0.03
    rising = best_box(torch.stack([steps, 0 * steps, 0 * steps], 1), BOXES.expand(len(steps), 3, 4), 0.3)
    assert (rising[1:] - rising[:-1]).abs().max() < 0.01


# its file


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [
        (SSDLITE, 91),
        (SSDLITE, 3),
        ("ssd300_vgg16", 2),
        ("retinanet_resnet50_fpn", 91),
        ("fcos_resnet50_fpn", 5),
    ],
)
def test_architecture_and_classes_follow_from_the_weights(name: str, num_classes: int) -> None:
    with torch.device("meta"):
        shapes = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=num_classes)
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in shapes.state_dict().items()}
    # frozen batch norm, as in torchvision's published weights, counts no batches
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    network, found = build_detector(state, "file")
    assert found == name
    assert {k: v.shape for k, v in network.state_dict().items()} == {
        k: v.shape for k, v in shapes.state_dict().items()
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [("fasterrcnn_mobilenet_v3_large_fpn", "two-stage"), ("", "no known")],
)
def test_other_files_are_refused_and_those_that_work_are_named(name: str, reason: str) -> None:
    state: dict[str, Tensor] = {"weight": torch.zeros(1)}
    if name:
        state = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=2).state_dict()
    with pytest.raises(ValueError, match=f"--crop-detector 'file'.*{reason}.*{SSDLITE}, ssd300"):
        build_detector(state, "file")


def model_with(path: Path, network: Any, **changes: Any) -> tuple[ImageClassifier, list[str]]:
    torch.save(network.state_dict(), path)
    model, _ = build_model("simple_cnn", 2, 32)
    settings = SETTINGS.replace(crop_detector=str(path), **changes).to_dict()
    return model, add_subject_crop(model, settings, 48)


def test_a_missing_file_is_named() -> None:
    model, _ = build_model("simple_cnn", 2, 32)
    with pytest.raises(ValueError, match=r"--crop-detector 'detector.pt'"):
        add_subject_crop(model, SETTINGS.to_dict(), 48)


def test_a_class_that_the_detector_lacks_is_refused(tmp_path: Path, ssdlite: Any) -> None:
    with pytest.raises(ValueError, match=r"--crop-classes 2,4.* 0 to 3"):
        model_with(tmp_path / "d.pt", ssdlite, crop_classes="2,4")


# in the classifier


def test_it_is_frozen_and_travels_with_the_weights(tmp_path: Path, ssdlite: Any) -> None:
    model, (note,) = model_with(tmp_path / "d.pt", ssdlite, crop_classes="1", crop_min_score=0.0)
    assert re.search(rf"{SSDLITE}.* \d+\.\d MB", note)
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(SETTINGS, model)
    model.train()
    model(pixels(48)).square().sum().backward()
    optimizer.step()
    after = model.state_dict()
    for key, value in before.items():
        if key.startswith("subject."):
            assert torch.equal(value, after[key]), key
    assert not torch.equal(before["network.features.0.weight"], after["network.features.0.weight"])
    assert not any(p.requires_grad for p in model.subject.parameters())

    (tmp_path / "d.pt").unlink()
    again, _ = build_model("simple_cnn", 2, 32)
    config = SETTINGS.replace(crop_detector="gone", crop_classes="1", crop_min_score=0.0)
    add_subject_crop(again, config.to_dict(), 48, after)
    again.load_state_dict(after)
    with torch.no_grad():
        assert torch.equal(model.eval()(pixels(48)), again.eval()(pixels(48)))

"""Locator of the subject by a frozen one-stage detector of torchvision.

Its heads score every anchor of every image in one batch, so that it runs inside the exported graph. A
two-stage detector does not: its number of regions depends on the image.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from serve.contract.errors import UserError
from train.models.classifier import ImageClassifier
from train.models.subject_crop.crop import in_float32, whole

ONE_STAGE = (
    "ssdlite320_mobilenet_v3_large",
    "ssd300_vgg16",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
)
NEARLY = 0.05  # a box whose score is within this share of the best one's counts, the less the lower
CERTAIN = 0.1  # this much above the threshold, the box counts fully


class DetectedSubject(nn.Module):
    """Locator of SubjectCrop by the detector's best box; the whole image where no score is `min_score`.

    Boxes whose scores nearly tie with the best are included with a weight that falls to 0, and just above
    `min_score` the box shrinks from the whole image: both keep the box a continuous function of the pixels.
    """

    detector: Any  # its parts have no types
    anchors: Tensor
    columns: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, detector: Any, classes: Sequence[int], min_score: float):
        """`detector` is of an architecture in ONE_STAGE, `classes` are the numbers of its classes that
        count (empty: all), and `min_score` is between 0 and 1."""
        super().__init__()
        transform = detector.transform
        self.size = int((transform.fixed_size or transform.min_size)[-1])
        self.detector = detector.eval().requires_grad_(False)
        self.classes, self.min_score = classes, min_score
        for name, values in (("mean", transform.image_mean), ("std", transform.image_std)):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        blank = torch.zeros(1, 3, self.size, self.size)
        with torch.no_grad():
            features = list(self.detector.backbone(blank).values())
            known = self.detector.head(features)["cls_logits"].shape[2]
        if any(number >= known for number in classes):
            listed = ",".join(map(str, classes))
            raise UserError(f"--crop-classes {listed}: the detector's classes are 0 to {known - 1}")
        self.register_buffer("columns", torch.tensor(classes, dtype=torch.long), persistent=False)
        (anchors,) = detector.anchor_generator(ImageList(blank, [(self.size, self.size)]), features)
        self.register_buffer("anchors", anchors, persistent=False)

    def train(self, mode: bool = True) -> "DetectedSubject":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, pixels: Tensor, classifier: ImageClassifier) -> tuple[Tensor, None]:
        """Return boxes [N, 4] in shares of the side of float32 [N, 3, P, P] of 0..255."""
        with in_float32(pixels):
            return best_box(*self.detect(pixels), self.min_score), None

    def detect(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [N, A] of all anchors and their boxes [N, A, 4]."""
        x = (pixels - self.mean) / self.std
        # like torchvision's own transform, without antialiasing
        x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)
        heads = self.detector.head(list(self.detector.backbone(x).values()))
        logits, regression = heads["cls_logits"], heads["bbox_regression"]
        if isinstance(self.detector, SSD):
            scores = logits.softmax(2)
            scores = scores[:, :, self.columns] if self.classes else scores[:, :, 1:]
        else:
            scores = (logits[:, :, self.columns] if self.classes else logits).sigmoid()
        score = scores.amax(2)
        if "bbox_ctrness" in heads:
            score = (score * heads["bbox_ctrness"].squeeze(2).sigmoid()).sqrt()
        coder = self.detector.box_coder
        if isinstance(coder, BoxCoder):
            boxes = decode(coder, regression, self.anchors)
        else:
            anchors = self.anchors.expand(pixels.shape[0], -1, -1).flatten(0, 1)
            boxes = coder.decode(regression.flatten(0, 1), anchors).view(-1, *self.anchors.shape)
        return score, (boxes / self.size).clamp(0.0, 1.0)


def decode(coder: BoxCoder, regression: Tensor, anchors: Tensor) -> Tensor:
    """Return the boxes [N, A, 4] of anchors [A, 4] and regressions [N, A, 4].

    torchvision's `decode_single` copies two constants to the device each time, and waits for it.
    """
    shift, _, growth, _ = coder.weights  # of both axes alike in all its detectors
    sides = anchors[:, 2:] - anchors[:, :2]
    centres = regression[..., :2] / shift * sides + (anchors[:, :2] + 0.5 * sides)
    half = 0.5 * (regression[..., 2:] / growth).clamp(max=coder.bbox_xform_clip).exp() * sides
    return torch.cat([centres - half, centres + half], 2)


def best_box(scores: Tensor, boxes: Tensor, min_score: float) -> Tensor:
    """Return [N, 4], the box of the highest score, of scores [N, A] and boxes [N, A, 4]."""
    best = scores.amax(1, keepdim=True)
    weights = F.relu(1 - (best - scores) / (NEARLY * best + 1e-12))[:, :, None]
    lower, upper = boxes[:, :, :2], boxes[:, :, 2:]
    centre = (weights * (lower + upper) / 2).sum(1) / weights.sum(1)
    reach = [
        (weights * (side * (edge - centre[:, None]))).amax(1) for side, edge in ((-1, lower), (1, upper))
    ]
    found = torch.cat([centre - reach[0], centre + reach[1]], 1)
    certainty = ((best - min_score) / CERTAIN).clamp(0.0, 1.0)
    return certainty * found + (1 - certainty) * whole(boxes)


def build_detector(state: Mapping[str, Tensor], source: str) -> tuple[nn.Module, str]:
    """Return the detector with these weights, and its architecture's name, which follows from their names.
    Raises UserError for weights of a two-stage detector or of something else."""
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    for name in ONE_STAGE:
        create = partial(getattr(detection, name), weights=None, weights_backbone=None)
        with torch.device("meta"):
            own = create(num_classes=2).state_dict()
        own = {key: value for key, value in own.items() if not key.endswith("num_batches_tracked")}
        if own.keys() != state.keys():
            continue
        # layers of the classification head are as many times wider as there are more classes
        widths = {len(state[key]) / len(own[key]) for key in own if state[key].shape != own[key].shape}
        if len(widths) > 1 or (widths and (2 * max(widths)) % 1):
            continue
        network: nn.Module = create(num_classes=round(2 * max(widths, default=1)))
        network.load_state_dict(state, strict=False)
        return network, name
    two_stage = any(key.startswith(("rpn.", "roi_heads.")) for key in state)
    raise UserError(
        f"--crop-detector {source!r} holds {'a two-stage detector' if two_stage else 'no known detector'}; "
        f"give weights of torchvision's {', '.join(ONE_STAGE)}"
    )

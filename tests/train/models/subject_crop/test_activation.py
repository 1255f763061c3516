"""Locating with the classifier's own feature map: the right map, the right evidence, the right box."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_crop import CAM, cam_model, pixels
from torch import Tensor, nn

from train.models.build import build_model
from train.models.classifier import ImageClassifier
from train.models.subject_crop.activation import ActivationMap, box_of_map, find_activation_map, on_grid
from train.models.subject_crop.build import add_subject_crop


@pytest.mark.parametrize(
    ("name", "size", "layer", "head", "grid"),
    [
        ("simple_cnn", 96, "features", "classifier.3", (32, 0)),
        ("simple_cnn", 64, "features.18", "", (16, 0)),  # the last map of 64 pixels has 2 cells a side
        ("resnet18", 96, "layer4", "fc", (32, 1)),
        ("densenet121", 96, "features", "classifier", (1, 0)),  # pools without padding, convolves with
        ("mobilenet_v3_small", 96, "features", "", (32, 1)),  # two linear layers behind the map
        ("squeezenet1_1", 96, "classifier.2", "", (1, 0)),
        ("timm/mobilenetv3_small_050", 96, "blocks", "", (32, 1)),
    ],
)
def test_the_last_map_and_what_reads_it_are_found(
    name: str, size: int, layer: str, head: str, grid: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    model, _ = build_model(name, 3, size)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = find_activation_map(model.network, name, size, 0.2, 1.0)
    assert (found.layer, found.head, found.grid) == (layer, head, grid)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())


def test_a_network_without_a_map_is_an_error_with_an_alternative() -> None:
    """A vision transformer's patches are a map, but what comes of them is a sequence."""
    name = "vit_tiny_patch16_224"
    model, _ = build_model(name, 3, 64)
    with pytest.raises(
        ValueError, match=rf"--subject-crop cam.*{name}.* 3 cells .*--subject-crop detector"
    ):
        find_activation_map(model.network, name, 64, 0.2, 1.0)


@given(st.integers(24, 600), st.sampled_from([(16, 0), (32, 1), (1, 0)]))
def test_the_view_has_a_size_of_the_grid_near_the_requested_one(size: int, grid: tuple[int, int]) -> None:
    view = on_grid(size, *grid)
    assert view % grid[0] == grid[1] % grid[0]
    assert abs(view - size) <= grid[0] / 2 + 1


def test_the_mean_of_class_activation_is_the_logit() -> None:
    """What makes it a class activation map: each cell's share of the logit."""
    model = cam_model(CAM.replace(image_size=96)).eval()
    assert model.subject is not None
    locator = model.subject.locator
    assert isinstance(locator, ActivationMap)
    network = model.network
    with torch.no_grad():
        features = network.features(model.normalise(pixels(96).permute(0, 3, 1, 2).float()))
        logits = network.classifier(features)
        linear = network.get_submodule(locator.head)
        maps = torch.einsum("kc,nchw->nkhw", linear.weight, features)
        torch.testing.assert_close(maps.mean((2, 3)) + linear.bias, logits, atol=1e-5, rtol=1e-5)
        evidence = locator.evidence(network, logits, features)
    expected = ((maps - maps.mean(1, keepdim=True)).clamp(min=0) * logits.softmax(1)[..., None, None]).sum(
        1
    )
    torch.testing.assert_close(evidence, expected, atol=1e-5, rtol=1e-5)


# box_of_map


def test_the_box_is_around_the_evidence() -> None:
    evidence = torch.zeros(3, 8, 8)
    evidence[0, 2, 5] = 1.0
    evidence[1, 1:3, 4:8] = 3.0
    evidence[2, 0, 0] = evidence[2, 7, 7] = 0.5  # two subjects: the box around both
    evidence[2, 3, 0] = 0.05  # below the threshold
    boxes = box_of_map(evidence, 0.2) * 8
    expected = [[5, 2, 6, 3], [4, 1, 8, 3], [0, 0, 8, 8]]
    assert torch.allclose(boxes, torch.tensor(expected).float(), atol=0.5)
    inside = boxes[1].tolist()
    assert inside[2] - inside[0] > 3


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-20, 1e20])
def test_an_even_map_gives_the_whole_image(value: float) -> None:
    boxes = box_of_map(torch.full((1, 5, 5), value), 0.2)
    assert torch.allclose(boxes, torch.tensor([[0.1, 0.1, 0.9, 0.9]]), atol=1e-3)  # TAIL on each side


@given(arrays(np.float32, (6, 6), elements=st.floats(0, 1, width=32)), st.integers(0, 35))
def test_boxes_do_not_jump(values: np.ndarray, place: int) -> None:
    """A difference of rounding in the map is one of rounding in the box, for whatever map."""
    evidence = torch.from_numpy(values)[None]
    nudged = evidence.clone()
    nudged.view(-1)[place] += 1e-6 * evidence.max()
    before, after = (box_of_map(e.double(), 0.2) for e in (evidence, nudged))
    assert (before - after).abs().max() < 2e-4
    assert (before[:, :2] <= before[:, 2:]).all()
    assert before.min() >= 0
    assert before.max() <= 1


# on images


class Redness(nn.Module):
    """A network made by hand: two classes, red and green, each a strided mean of its colour's excess."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 2, 8, 8, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            weights = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0]])
            self.colours.weight.copy_(weights[:, :, None, None].expand(2, 3, 8, 8) / 64)
            self.head.weight.copy_(torch.eye(2) * 10)
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.colours(x).relu()).flatten(1))
        return logits


def scene(colour: int, x: int, y: int, side: int, size: int = 96) -> Tensor:
    """uint8 [size, size, 3]: one square of a colour on blue clutter."""
    generator = torch.Generator().manual_seed(x * 100 + y)
    image = torch.randint(0, 90, (size, size, 3), generator=generator)
    image[:, :, 2] += 100
    image[y : y + side, x : x + side] = 0
    image[y : y + side, x : x + side, colour] = 255
    return image.to(torch.uint8)


PLACES = [(8, 8, 32), (56, 8, 32), (40, 48, 24), (0, 64, 32), (16, 24, 56)]


@pytest.mark.parametrize("colour", [0, 1])
@pytest.mark.parametrize(("x", "y", "side"), PLACES)
def test_the_square_is_on_the_subject(colour: int, x: int, y: int, side: int) -> None:
    model = ImageClassifier(Redness(), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    config = CAM.replace(subject_zoom=3.0, subject_margin=0.15, cam_zoom=3.0)
    add_subject_crop(model, config.to_dict(), 96)
    left, upper, right, lower = (model.eval().locate(scene(colour, x, y, side)[None])[0] * 96).tolist()
    slack = 4  # half a cell
    assert left <= x + slack
    assert upper <= y + slack
    assert right >= x + side - slack
    assert lower >= y + side - slack
    assert right - left <= max(32, 1.3 * side) + 2 * slack


@pytest.mark.slow
def test_a_short_training_finds_the_subject() -> None:
    """The labels are the colours of the squares; their positions are in no label."""
    torch.manual_seed(0)
    model = cam_model(CAM.replace(image_size=64, subject_zoom=1.5, cam_zoom=1.5))
    random = np.random.default_rng(0)

    def batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
        colours = torch.from_numpy(random.integers(0, 3, n))
        places = torch.from_numpy(random.integers(0, 72, (n, 2)))
        images = [scene(int(c), int(x), int(y), 24) for c, (x, y) in zip(colours, places, strict=True)]
        return torch.stack(images), colours, places + 12

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(80):
        images, colours, _ = batch(8)
        nn.functional.cross_entropy(model(images), colours).backward()
        optimizer.step()
        optimizer.zero_grad()
    images, _, centres = batch(48)
    with torch.no_grad():
        boxes = model.eval().locate(images) * 96
    held = ((boxes[:, :2] <= centres) & (centres <= boxes[:, 2:])).all(1).float().mean()
    share = float(((boxes[:, 2] - boxes[:, 0]) / 96).square().mean())
    assert held > share + 0.5 * (1 - share), (held, share)  # `share` is what chance gives
    assert share < 0.9

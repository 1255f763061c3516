"""Subject crop: crops are Pillow's, boxes lie in the image, and training learns from the crops alone."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from train.config import TrainConfig
from train.models.build import build_model
from train.models.classifier import ImageClassifier
from train.models.subject_crop.build import add_subject_crop
from train.models.subject_crop.crop import SubjectCrop, crop_and_resize, square, whole

CAM = TrainConfig(model="simple_cnn", image_size=64, subject_crop="cam", batch_size=4)


def cam_model(config: TrainConfig = CAM, name: str = "simple_cnn") -> ImageClassifier:
    torch.manual_seed(0)
    model, _ = build_model(name, 3, config.image_size)
    add_subject_crop(model, config.to_dict(), config.preprocess().size)
    return model


def pixels(size: int = 96, n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator)


# cropping


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0.0, 0.0, 1.0, 1.0), 24),
        ((0.0, 0.0, 1.0, 1.0), 61),
        ((0.1, 0.3, 0.6, 0.8), 24),
        ((0.1234, 0.0, 0.7, 1.0), 48),
        ((0.5, 0.5, 0.75, 0.75), 48),
        ((0.4, 0.0, 1.0, 0.6), 8),
    ],
)
def test_a_crop_is_pillows_antialiased_resize_to_within_one_grey_level(
    box: tuple[float, ...], size: int
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    scaled = tuple(edge * 96 for edge in box)
    expected = np.asarray(
        Image.fromarray(noise).resize((size, size), Image.Resampling.BILINEAR, box=scaled)
    )
    image = torch.from_numpy(noise).permute(2, 0, 1)[None].float()
    result = crop_and_resize(image, torch.tensor([box]), size)[0].permute(1, 2, 0).numpy()
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= 1.01


def test_each_image_is_cut_at_its_own_box() -> None:
    images = pixels(32, 3).permute(0, 3, 1, 2).float()
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.25, 1.0, 0.75], [0.25, 0.5, 0.75, 1.0]])
    result = crop_and_resize(images, boxes, 16)
    torch.testing.assert_close(result[0], images[0, :, :16, :16])
    torch.testing.assert_close(result[1], images[1, :, 8:24, 16:])
    torch.testing.assert_close(result[2], images[2, :, 16:, 8:24])


unit = st.floats(0, 1, width=32)


@given(st.tuples(unit, unit, unit, unit), st.floats(0, 0.5), st.floats(0.1, 1))
def test_squares_hold_the_box_and_lie_in_the_image(
    edges: tuple[float, float, float, float], margin: float, smallest: float
) -> None:
    x, y = sorted(edges[:2]), sorted(edges[2:])
    left, upper, right, lower = square(torch.tensor([[x[0], y[0], x[1], y[1]]]), margin, smallest)[
        0
    ].tolist()
    side, near = right - left, 1e-5
    assert side == pytest.approx(lower - upper, abs=near)
    assert min(1, smallest) - near <= side <= 1 + near
    assert -near <= min(left, upper)
    assert max(right, lower) <= 1 + near
    assert left <= x[0] + near
    assert upper <= y[0] + near
    assert right >= x[1] - near
    assert lower >= y[1] - near
    wanted = (1 + 2 * margin) * max(x[1] - x[0], y[1] - y[0])
    assert side == pytest.approx(min(1, max(smallest, wanted)), abs=near)


# what the network sees


class Corner(nn.Module):
    """A locator whose subject is always in the lower right."""

    def forward(self, images: Tensor, classifier: ImageClassifier) -> tuple[Tensor, None]:
        return images.new_tensor([[0.6, 0.7, 0.9, 0.9]]).expand(len(images), 4), None


def corner_model(average: bool = False) -> ImageClassifier:
    torch.manual_seed(0)
    model, _ = build_model("simple_cnn", 3, 32)
    model.subject = SubjectCrop(Corner(), zoom=2.0, margin=0.0, average=average)
    return model


LOWER_RIGHT = (slice(None), slice(32, 64), slice(32, 64))  # smallest square; it cannot leave the image


def test_evaluation_scores_the_crop() -> None:
    model, images = corner_model().eval(), pixels(64)
    with torch.no_grad():
        assert model.locate(images)[0].tolist() == pytest.approx([0.5, 0.5, 1.0, 1.0])
        result = model(images)
        model.subject = None
        torch.testing.assert_close(result, model(images[LOWER_RIGHT]), atol=1e-5, rtol=1e-5)


def test_an_average_is_of_crop_and_whole_image() -> None:
    model, images = corner_model(average=True).eval(), pixels(64)
    shrunk = crop_and_resize(
        images.permute(0, 3, 1, 2).float(), torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 4), 32
    )
    with torch.no_grad():
        result = model(images)
        model.subject = None
        expected = (model(images[LOWER_RIGHT]) + model.score(shrunk)) / 2
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("average", [True, False])
def test_before_its_start_the_whole_image_is_seen(average: bool) -> None:
    model, images = corner_model(average).eval(), pixels(64)
    assert model.subject is not None
    model.subject.active = False
    shrunk = crop_and_resize(
        images.permute(0, 3, 1, 2).float(), torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 4), 32
    )
    with torch.no_grad():
        torch.testing.assert_close(model(images), model.score(shrunk))
    assert torch.equal(model.locate(images), whole(shrunk))


@pytest.mark.parametrize("average", [True, False])
def test_training_sees_crops_or_crops_of_each_second_image(average: bool) -> None:
    model, images = corner_model(average).train(), pixels(64)
    seen: list[Tensor] = []
    model.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images)
    raw = images.permute(0, 3, 1, 2).float()
    expected = model.normalise(crop_and_resize(raw, model.locate(images), 32))
    if average:
        expected[::2] = model.normalise(crop_and_resize(raw, whole(raw), 32))[::2]
    torch.testing.assert_close(seen[0], expected)


def test_a_magnification_never_invents_pixels() -> None:
    """The smallest square is as large as the network's input."""
    model = corner_model().eval()
    left, _, right, _ = model.locate(pixels(64))[0].tolist()
    assert round((right - left) * 64) == 32


# training


@pytest.mark.parametrize("name", ["simple_cnn", "mobilenet_v3_small"])
def test_locating_trains_nothing(name: str) -> None:
    """Batch-norm statistics, gradients and modes are those of a step on the crops alone."""
    model = cam_model(CAM.replace(image_size=96), name)
    images = pixels(144)
    model.train()
    frozen = next(m for m in model.network.modules() if isinstance(m, nn.BatchNorm2d))
    frozen.eval()  # a mode of its own, which must be as it was afterwards
    plain, another = copy.deepcopy(model), copy.deepcopy(model)
    assert another.subject is not None
    crops = another.subject(images.permute(0, 3, 1, 2).float(), another)
    torch.manual_seed(1)
    model(images).square().sum().backward()
    torch.manual_seed(1)
    plain.network(plain.normalise(crops)).square().sum().backward()
    for (key, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert ours.grad is not None, key
        assert torch.equal(ours.grad, theirs.grad), key
    for (key, a), (_, b) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(a, b), key
    assert [m.training for m in model.modules()] == [m.training for m in plain.modules()]
    assert not frozen.training


def test_half_precision_training_reaches_every_weight() -> None:
    """autocast caches the weights that it casts: those cast without gradients must not be used again."""
    model = cam_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels())
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_boxes_and_pixels_are_exact_in_half_precision() -> None:
    model, images = corner_model().train(), pixels(64)
    seen: list[Tensor] = []
    model.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images)
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    assert torch.equal(*seen)


# settings


@pytest.mark.parametrize("zoom", [1.0, 1.1, 1.37, 1.5, 2.5, 4.0])
def test_the_networks_input_has_the_requested_size(zoom: float) -> None:
    subject = SubjectCrop(Corner(), zoom, 0.0, average=False)
    for size in range(8, 600):
        side = TrainConfig(subject_crop="cam", subject_zoom=zoom).input_size(size)
        assert subject.size(torch.empty(0, 3, side, side)) == size

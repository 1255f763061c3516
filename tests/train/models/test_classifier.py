"""The module that is trained and exported: networks of all libraries, normalisation inside."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from train_data import build, logits, pixels

from train.evaluation.calibration import log_probabilities
from train.models.classifier import IMAGENET_MEAN, IMAGENET_STD, Outputs, probabilities


def test_auxiliary_heads_are_there_in_training_only() -> None:
    model = build("googlenet", 4, 64)
    output = model(pixels(64))
    assert isinstance(output, Outputs)
    assert [tuple(a.shape) for a in (output.logits, *output.auxiliary)] == [(2, 4)] * 3
    assert isinstance(logits(model, 64), Tensor)


def test_normalisation_is_inside() -> None:
    model = build()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = (pixels().permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        expected = model.eval().network(x)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert {"mean", "std"} <= set(model.state_dict())


def test_googlenets_normalisation_is_that_of_its_weights() -> None:
    """torchvision's pretrained GoogLeNet sets transform_input, which undoes ImageNet's normalisation."""
    model = build("googlenet", 4, 64).eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = (pixels(64).permute(0, 3, 1, 2) / 255 - mean) / std
    seen = []
    model.network.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model, 64)
    model.network.transform_input = True
    with torch.no_grad():
        model.network(x)
    assert torch.allclose(*seen, atol=1e-5)


def test_timms_normalisation_is_that_of_its_weights_also_without_them() -> None:
    """Weights that come from a file must see what they were trained on."""
    model = build("vit_tiny_patch16_224", 3, 32)
    assert torch.allclose(model.mean / 255, torch.full((1, 3, 1, 1), 0.5))


@pytest.mark.parametrize("name", ["simple_cnn", "resnet18"])
def test_memory_formats_give_the_same_logits(name: str) -> None:
    model = build(name)
    expected = logits(model)
    model.channels_last = True
    assert torch.allclose(logits(model.to(memory_format=torch.channels_last)), expected, atol=1e-4)


def test_half_precision_gives_float32_logits() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(build()).dtype == torch.float32


def test_temperature_and_mirror_image_are_for_evaluation_alone() -> None:
    model = build()
    images = pixels()
    model.eval()
    with torch.no_grad():
        plain, mirrored = model(images), model(images.flip(2))
    model.temperature.fill_(2.0)
    assert torch.allclose(logits(model), plain / 2)
    model.flip_tta = True
    assert torch.allclose(logits(model), (plain + mirrored) / 4, atol=1e-6)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.Dropout):
            module.eval()
    with torch.no_grad():
        assert torch.allclose(model(images), plain, atol=1e-6)


# fixed layers


def test_frozen_modules_stay_in_eval_mode_and_the_rest_trains() -> None:
    model = build("resnet18")
    note = model.freeze(3)
    fixed = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert 0 < fixed < sum(p.numel() for p in model.parameters())
    assert f"{fixed:,}" in note
    assert "layer1.1." in note
    model.train()
    modes = {name: m.training for name, m in model.network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {name for name, training in modes.items() if not training} == {
        "bn1",
        *(f"layer1.{i}.bn{j}" for i in (0, 1) for j in (1, 2)),
    }
    model.eval()
    assert not any(m.training for m in model.modules())


def test_dropout_in_frozen_layers_is_off_and_before_the_head_on() -> None:
    model = build("mobilenet_v3_small")
    model.freeze(-1)
    model.train()
    assert model.network.classifier[2].training
    assert not model.network.features.training


def test_frozen_statistics_do_not_move_and_no_graph_is_kept() -> None:
    model = build("resnet18")
    model.freeze(-1)
    model.train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    seen: list[Tensor] = []
    model.network.avgpool.register_forward_hook(lambda _, __, output: seen.append(output))
    model(pixels()).sum().backward()
    assert not seen[0].requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert [k for k, p in model.network.named_parameters() if p.grad is not None] == [
        "fc.weight",
        "fc.bias",
    ]


@pytest.mark.parametrize("name", ["mnasnet0_5", "resnet18"])
def test_plain_dictionaries_of_weights_are_loaded(name: str) -> None:
    """torchvision's MNASNet asks for a version, which only torch's own dictionaries have."""
    model, other = build(name), build(name)
    state = {key: value + 1 for key, value in model.state_dict().items()}
    other.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("clip", [0.0, 0.02])
def test_probabilities_are_those_of_the_metrics(clip: float) -> None:
    values = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    result = probabilities(values, clip)
    np.testing.assert_allclose(result, np.exp(log_probabilities(values.numpy(), 1.0, clip)), atol=1e-12)
    np.testing.assert_allclose(result.sum(1), 1.0)
    assert result.min() >= clip

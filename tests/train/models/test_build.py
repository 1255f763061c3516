"""Classifiers by name: networks of all libraries are built, and sizes that they cannot take are errors."""

import pytest
import torch
from torch import nn
from train_data import build, logits, pixels

from train.models.build import try_forward
from train.models.subject_crop.crop import SubjectCrop


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 32),
        ("mobilenet_v3_small", 48),
        ("squeezenet1_1", 64),
        ("timm/resnet10t", 64),
        ("timm/resnet18", 32),
        ("vit_tiny_patch16_224", 64),
    ],
)
def test_networks_of_torchvision_and_timm_train_and_evaluate(name: str, size: int) -> None:
    model = build(name, 5, size)
    assert model.training
    model(pixels(size)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    result = logits(model, size)
    assert result.shape == (2, 5)
    assert result.dtype == torch.float32


def test_a_transformer_that_would_not_see_the_last_rows_is_an_error_with_sizes_that_fit() -> None:
    name = "timm/vit_tiny_patch16_224"
    with pytest.raises(ValueError, match=r"40.*16.* 8; .*32.*48"):
        build(name, 3, 40)
    model = build(name, 3, 48)
    model.subject = SubjectCrop(nn.Identity(), zoom=1.25, margin=0.1, average=False)
    model.subject.active = False
    try_forward(model, name, 3, 60)  # of which the network sees 48
    with pytest.raises(ValueError, match=r"70.*32.* 6; .*64.*96"):
        build("timm/mixer_s32_224", 3, 70)
    for overlapping in ("timm/pvt_v2_b0", "timm/xcit_nano_12_p8_224"):
        build(overlapping, 3, 48)


def test_an_encoder_without_a_head_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"qwen3_vit_88m_enc is no classifier.*--model"):
        build("timm/qwen3_vit_88m_enc", 3, 64)


def test_timms_prefix_insists_on_timm() -> None:
    assert type(build("resnet18").network).__module__.startswith("torchvision.")
    assert type(build("timm/resnet18").network).__module__.startswith("timm.")


@pytest.mark.parametrize(
    ("name", "size"),
    [("alexnet", 16), ("inception_v3", 128), ("vit_b_16", 40), ("timm/twins_svt_small", 40)],
)
def test_images_of_the_wrong_size_are_an_error_that_names_it(name: str, size: int) -> None:
    """For Inception it is an auxiliary head, which evaluation does not have, that cannot take them; some
    networks cannot even be built."""
    with pytest.raises(ValueError, match=f"{name}.* {size} pixels"):
        build(name, 3, size)

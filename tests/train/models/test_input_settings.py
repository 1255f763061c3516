"""The input that weights were trained with, which is used where no other is given."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
from test_transfer import save_run, trained_state
from train_data import build

from train.config import TrainConfig
from train.models.build import build_model
from train.models.input_settings import InputSettings, input_settings, resolve_input
from train.models.pretrained import read_weights

LITE = "tf_efficientnet_lite0"


def test_torchvisions_input_is_that_of_the_weights() -> None:
    own = input_settings("efficientnet_b0", "default", {})
    assert (own.image_size, own.crop_ratio, own.interpolation) == (224, 224 / 256, "bicubic")
    assert "EfficientNet_B0_Weights.IMAGENET1K_V1" in own.source


def test_torchvisions_files_are_known_by_name(tmp_path: Path) -> None:
    first = input_settings("resnet50", str(tmp_path / "resnet50-0676ba61.pth"), {"x": 1})
    second = input_settings("resnet50", str(tmp_path / "resnet50-11ad3fa6.pth"), {"x": 1})
    assert (round(224 / first.crop_ratio), round(224 / second.crop_ratio)) == (256, 232)
    assert first.source.endswith("ResNet50_Weights.IMAGENET1K_V1")
    other = input_settings("resnet50", str(tmp_path / "mine.pth"), {"x": 1})
    assert re.search("ResNet50_Weights.IMAGENET1K_V2.*assumed", other.source)
    vgg = input_settings("vgg16", "vgg16_features-amdegroot-88682ab5.pth", {"x": 1})
    assert max(vgg.std) < 0.005


def test_timms_input_is_that_of_the_weights_tag() -> None:
    own = input_settings("timm/resnet50.a1_in1k", "default", {})
    assert (own.image_size, own.crop_ratio, own.interpolation) == (224, 0.95, "bicubic")
    assert input_settings(LITE, "package", {"x": 1}) == InputSettings(
        f"timm's {LITE}.in1k", 224, "crop", 0.875, "bicubic", (0.5,) * 3, (0.5,) * 3
    )
    assert input_settings("timm/beit_base_patch16_224", "default", {}).mean == (0.5,) * 3


def test_timms_old_names_have_the_input_of_the_weights_that_they_mean() -> None:
    old, new = (
        input_settings(name, "default", {})
        for name in ("tf_efficientnet_b5_ns", "tf_efficientnet_b5.ns_jft_in1k")
    )
    assert old == new
    assert old.image_size == 456
    assert input_settings("vit_base_patch16_224_in21k", "default", {}).mean == (0.5,) * 3


def test_timms_squash_is_kept_and_its_crops_end_with_the_image() -> None:
    assert input_settings("timm/convnext_base.fb_in22k_ft_in1k_384", "default", {}).resize_mode == "squash"
    assert input_settings("timm/volo_d4_448.sail_in1k", "default", {}).crop_ratio == 1.0  # timm says 1.15


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_what_torchvision_changes_within_a_pretrained_network_is_in_the_normalisation(name: str) -> None:
    with torch.device("meta"):
        network = getattr(torchvision.models, name)(init_weights=False, transform_input=True)
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    own, colours = input_settings(name, "default", {}), torch.rand(2, 3, 4, 4)
    mean, std, own_mean, own_std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (transforms.mean, transforms.std, own.mean, own.std)
    )
    expected = network._transform_input((colours - mean) / std)
    torch.testing.assert_close((colours - own_mean) / own_std, expected)


def test_a_runs_input_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    file = str(save_run(trained_state(), tmp_path))
    content = read_weights("simple_cnn", file)
    content["ema"]["mean"] += 1.0
    content["preprocess"] = {"mode": "pad", "size": 48, "resize_size": 60, "interpolation": "lanczos"}
    own = input_settings("simple_cnn", file, content)
    assert (own.image_size, own.resize_mode, own.crop_ratio, own.interpolation) == (
        32,
        "pad",
        0.8,
        "lanczos",
    )
    assert own.mean == pytest.approx((0.485 + 1 / 255, 0.456 + 1 / 255, 0.406 + 1 / 255))


def test_a_checkpoints_normalisation_is_kept(tmp_path: Path) -> None:
    file = save_run(trained_state(), tmp_path)
    content = torch.load(file, weights_only=True)
    content["ema"]["std"] *= 2
    torch.save(content, tmp_path / "other.pt")
    model, _ = build_model("simple_cnn", 3, 32, str(tmp_path / "other.pt"))
    assert torch.allclose(model.std, build().std * 2)


def test_without_weights_the_input_is_the_projects() -> None:
    config, notes = resolve_input(TrainConfig(model="timm/resnet50.a1_in1k"))
    assert (config.image_size, config.resize_mode, config.resize_size) == (128, "crop", 146)
    assert config.interpolation == "bilinear"
    assert notes == []
    assert input_settings("timm/beit_base_patch16_224", "", {}).mean == (0.5,) * 3


def test_what_is_not_given_is_taken_from_the_weights_and_reported() -> None:
    config, notes = resolve_input(TrainConfig(model="efficientnet_b0", weights="default"))
    assert (config.image_size, config.resize_size, config.interpolation) == (224, 256, "bicubic")
    (note,) = notes
    for text in (
        "EfficientNet_B0_Weights.IMAGENET1K_V1",
        "image_size 224",
        "resize_mode crop",
        "resize_size 256",
        "interpolation bicubic",
        "mean 0.485 0.456 0.406",
        "std 0.229 0.224 0.225",
    ):
        assert text in note


def test_what_is_given_holds_and_keeps_the_crops_share() -> None:
    given = TrainConfig(model="efficientnet_b0", weights="default", image_size=128, interpolation="lanczos")
    config, notes = resolve_input(given)
    assert (config.image_size, config.resize_size, config.interpolation) == (128, 146, "lanczos")
    assert notes[0].endswith("given: image_size 128, interpolation lanczos")
    larger, _ = resolve_input(given.replace(eval_size=160))
    assert larger.preprocess().resize_size == round(160 * 256 / 224)


def test_a_subject_is_cut_from_the_whole_image_whatever_the_weights_cut_off() -> None:
    given = TrainConfig(model="efficientnet_b0", weights="default", subject_crop="cam", subject_zoom=1.5)
    config, _ = resolve_input(given)
    assert config.image_size == 224
    assert (config.preprocess().size, config.preprocess().resize_size) == (336, 336)


def test_resolved_settings_stay_as_they_are() -> None:
    config, _ = resolve_input(TrainConfig(model="efficientnet_b0", weights="default"))
    assert resolve_input(config)[0] == config


def test_an_unknown_model_or_a_missing_file_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="--model 'resnet81'"):
        resolve_input(TrainConfig(model="resnet81"))
    with pytest.raises(ValueError, match=r"--weights 'nowhere.pt'"):
        resolve_input(TrainConfig(weights="nowhere.pt"))

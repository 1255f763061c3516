"""Networks by name: what they take, how weights are loaded or refused, normalisation inside."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from train.calibration import log_probabilities
from train.checkpoint import save_checkpoint
from train.model import IMAGENET_MEAN, IMAGENET_STD, ImageClassifier, Outputs, build_model, probabilities


def build(name: str = "simple_cnn", classes: int = 3, size: int = 32, **options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return build_model(name, classes, size, **options)[0]


def pixels(size: int = 32, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator)


def logits(model: ImageClassifier, size: int = 32) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(pixels(size))
    return result


# names and sizes


@pytest.mark.parametrize("size", [8, 9, 31, 100])
def test_simple_cnn_takes_any_size(size: int) -> None:
    model = build(size=size)
    assert logits(model, size).shape == (2, 3)


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


def test_timms_prefix_insists_on_timm() -> None:
    assert type(build("resnet18").network).__module__.startswith("torchvision.")
    assert type(build("timm/resnet18").network).__module__.startswith("timm.")


def test_auxiliary_heads_are_there_in_training_only() -> None:
    model = build("googlenet", 4, 64)
    output = model(pixels(64))
    assert isinstance(output, Outputs)
    assert [tuple(a.shape) for a in (output.logits, *output.auxiliary)] == [(2, 4)] * 3
    assert isinstance(logits(model, 64), Tensor)


@pytest.mark.parametrize(("name", "size"), [("alexnet", 16), ("inception_v3", 128)])
def test_images_too_small_are_an_error_that_names_the_size(name: str, size: int) -> None:
    """For Inception it is an auxiliary head, which evaluation does not have, that cannot take them."""
    with pytest.raises(ValueError, match=f"{name} cannot take images of {size} pixels: "):
        build(name, 3, size)


@pytest.mark.parametrize(
    ("name", "close"), [("resnet81", "resnet18"), ("timm/efficientnetb0", "efficientnet_b0")]
)
def test_an_unknown_name_suggests_close_ones(name: str, close: str) -> None:
    with pytest.raises(ValueError, match=f"unknown --model '{name}'; the closest names are .*{close}"):
        build(name)


# what the module does


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


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("simple_cnn", 32),
        ("mobilenet_v3_small", 32),
        ("timm/resnet10t", 32),
        ("timm/mobilenetv3_small_050", 32),
    ],
)
def test_dropout_sets_all_layers(name: str, size: int) -> None:
    """Also those of timm that are functions with a probability."""
    certain = build(name, size=size, dropout=0.95)
    assert all(m.p == 0.95 for m in certain.modules() if isinstance(m, nn.Dropout))
    certain.eval()
    for module in certain.modules():
        if isinstance(module, nn.Dropout) or hasattr(module, "drop_rate"):
            module.train(True)
    a, b = certain(pixels(size)), certain(pixels(size))
    certain.eval()
    assert not torch.equal(a, b), "nothing was dropped"
    assert torch.equal(certain(pixels(size)), certain(pixels(size)))


def test_dropout_that_changes_nothing_is_said() -> None:
    _, notes = build_model("resnet18", 3, 32, dropout=0.5)
    assert notes == ["warning: resnet18 has no dropout layers, --dropout 0.5 changes nothing"]
    assert build_model("simple_cnn", 3, 32, dropout=0.5)[1] == []


# weights


def trained_state(classes: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return dict(build_model("simple_cnn", classes, 32)[0].network.state_dict())


def save_plain(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "w.pt")
    return folder / "w.pt"


def save_nested(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 1}, folder / "w.pth")
    return folder / "w.pth"


def save_ours(state: dict[str, Tensor], folder: Path) -> Path:
    model = build(classes=state["classifier.3.weight"].shape[0])
    other = {name: value.clone() for name, value in model.state_dict().items()}
    model.network.load_state_dict(state)
    save_checkpoint({"model": other, "ema": model.state_dict(), "epoch": 1}, folder / "best.pt")
    return folder / "best.pt"


def save_safe(state: dict[str, Tensor], folder: Path) -> Path:
    safetensors.torch.save_file(state, folder / "w.safetensors")
    return folder / "w.safetensors"


SAVERS = [save_plain, save_nested, save_ours, save_safe]


@pytest.mark.parametrize("save", SAVERS)
def test_weights_are_loaded_from_a_file(tmp_path: Path, save: Any) -> None:
    state = trained_state()
    file = save(state, tmp_path)
    model, notes = build_model("simple_cnn", 3, 32, str(file))
    assert all(torch.equal(value, state[name]) for name, value in model.network.state_dict().items())
    assert notes == [f"{file}: {len(state)} of {len(state)} tensors loaded"]


@pytest.mark.parametrize("save", SAVERS)
def test_weights_of_another_number_of_classes_get_a_new_head(tmp_path: Path, save: Any) -> None:
    state = trained_state(classes=10)
    model, notes = build_model("simple_cnn", 3, 32, str(save(state, tmp_path)))
    same = {name for name, value in model.network.state_dict().items() if value.equal(state[name])}
    assert set(state) - same == {"classifier.3.weight", "classifier.3.bias"}
    assert notes[0].endswith("; new head: classifier.3")


def test_weights_that_are_not_used_are_named(tmp_path: Path) -> None:
    file = save_plain({**trained_state(), "extra.weight": torch.ones(2)}, tmp_path)
    assert build_model("simple_cnn", 3, 32, str(file))[1][0].endswith("; not used: extra.weight")


def other_network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return build("squeezenet1_1", 3, 64).network.state_dict()


def without_a_layer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != "features.4.weight"}


def other_channels(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "features.0.weight": torch.ones(32, 1, 3, 3)}


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (other_network, "features"),
        (without_a_layer, "features.4.weight"),
        (other_channels, "features.0.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_what_is_missing_is_named(
    tmp_path: Path, change: Any, missing: str
) -> None:
    file = save_plain(change(trained_state()), tmp_path)
    with pytest.raises(ValueError, match=f"w.pt' do not fit this network: .*missing .*{missing}"):
        build(weights=str(file))


def test_weights_of_a_vit_at_another_size_are_refused(tmp_path: Path) -> None:
    """Its position embeddings differ in shape; starting them anew would not be these weights."""
    file = save_plain(build("vit_tiny_patch16_224", 3, 32).network.state_dict(), tmp_path)
    with pytest.raises(ValueError, match=r"do not fit this network: 1 of .* missing .pos_embed"):
        build("vit_tiny_patch16_224", 3, 64, weights=str(file))


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
    file = save_ours(trained_state(), tmp_path)
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


def test_default_weights_without_a_network_are_an_error_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # refuses, also where there is a network
    with pytest.raises(
        ValueError, match=r"squeezenet1_1's weights could not be downloaded .*--weights FILE"
    ):
        build("squeezenet1_1", 3, 64, weights="default")


def test_simple_cnn_has_no_default_weights() -> None:
    with pytest.raises(ValueError, match="simple_cnn has no pretrained weights"):
        build(weights="default")


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


@pytest.mark.parametrize("clip", [0.0, 0.02])
def test_probabilities_are_those_of_the_metrics(clip: float) -> None:
    values = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    result = probabilities(values, clip)
    np.testing.assert_allclose(result, np.exp(log_probabilities(values.numpy(), 1.0, clip)), atol=1e-12)
    np.testing.assert_allclose(result.sum(1), 1.0)
    assert result.min() >= clip / 1.1

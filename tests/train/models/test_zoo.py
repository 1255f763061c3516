"""Architectures by name: sizes, dropout and stochastic depth; helpful errors."""

import re

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth
from train_data import build, logits, pixels

from train.models.build import build_model
from train.models.layers import layer_groups
from train.models.zoo import (
    OWN,
    LeNet5,
    closest_names,
    create,
    drop_path_of,
    dropout_of,
    library_of,
    set_dropout,
)


@pytest.mark.parametrize("size", [8, 9, 31, 100])
def test_simple_cnn_takes_any_size(size: int) -> None:
    model = build(size=size)
    assert logits(model, size).shape == (2, 3)


@pytest.mark.parametrize("size", [32, 33, 64, 100])
def test_lenet5_takes_any_size_from_32(size: int) -> None:
    assert logits(build("lenet5", size=size), size).shape == (2, 3)


def test_lenet5_has_the_papers_layers() -> None:
    shapes = [tuple(p.shape) for p in LeNet5(10).parameters() if p.ndim > 1]
    assert shapes == [(6, 3, 5, 5), (16, 6, 5, 5), (120, 16, 5, 5), (84, 120), (10, 84)]


def test_lenet5_below_32_is_an_error_that_names_the_size() -> None:
    with pytest.raises(ValueError, match=r"lenet5.* 31 pixels"):
        build("lenet5", size=31)


def test_an_unknown_tag_of_timms_weights_suggests_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"--model 'timm/resnet10t.a1_in1k'.* resnet10t\.c3_in1k"):
        library_of("timm/resnet10t.a1_in1k")


def tiny_net(num_classes: int) -> nn.Module:
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), pool, nn.Flatten(), nn.Linear(4, num_classes))


def test_a_new_architecture_is_an_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OWN, "tiny_net", tiny_net)
    model = build("tiny_net", 5)
    assert logits(model).shape == (2, 5)
    assert layer_groups(model.network) == [["0.weight", "0.bias"], ["3.weight", "3.bias"]]
    assert closest_names("tiny")[0] == "tiny_net"


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("resnet81", "resnet18"),
        ("resnet-18", "resnet18"),
        ("ResNet50", "resnet50"),
        ("timm/efficientnetb0", "efficientnet_b0"),
        ("efficientnet-lite0", "tf_efficientnet_lite0"),
        ("efficientnet", "efficientnet_b0"),
        ("lenet", "lenet5"),
        ("senet", "senet154"),
        ("nasnet", "nasnetalarge"),
        ("vit", "vit_b_16"),
        ("swin", "swin_t"),
        ("vgg16bn", "vgg16_bn"),
        ("mobilenetv3", "mobilenet_v3_small"),
        ("resnext50", "resnext50_32x4d"),
    ],
)
def test_an_unknown_name_suggests_close_ones(name: str, close: str) -> None:
    with pytest.raises(ValueError, match=f"--model '{name}'.* {close}(,|$)"):
        library_of(name)


@pytest.mark.parametrize("name", ["", "---", "xyzzy"])
def test_a_name_like_no_other_suggests_none(name: str) -> None:
    assert closest_names(name) == []


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


def test_dropout_that_changes_nothing_is_a_warning() -> None:
    (note,) = build_model("resnet18", 3, 32, dropout=0.5)[1]
    assert re.match(r"warning: .*--dropout 0.5", note)
    assert build_model("simple_cnn", 3, 32, dropout=0.5)[1] == []


def depth(name: str, rate: float | None) -> list[float]:
    """Probabilities of leaving out a block, from the input to the output."""
    model = build(name, drop_path=rate)
    kinds = (m for m in model.modules() if type(m).__name__ in ("StochasticDepth", "DropPath"))
    return [m.p if isinstance(m, StochasticDepth) else m.drop_prob for m in kinds]


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "convnext_tiny", "timm/convnext_atto", "timm/resnet10t"]
)
def test_drop_path_grows_with_depth_up_to_its_setting(name: str) -> None:
    rates = depth(name, 0.4)
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.4)
    assert max(depth(name, 0.0), default=0) == 0


def test_drop_path_unset_is_the_architectures_own() -> None:
    assert depth("efficientnet_b0", None)[-1] == pytest.approx(0.2 * 15 / 16)


def test_drop_path_leaves_blocks_out_in_training_alone() -> None:
    model = build("timm/convnext_atto", drop_path=0.9)
    torch.nn.init.normal_(model.network.head.fc.weight)
    for module in model.modules():
        if hasattr(module, "gamma") and isinstance(module.gamma, nn.Parameter):
            nn.init.ones_(module.gamma)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(model(pixels()), model(pixels()))


@pytest.mark.parametrize("name", ["resnet18", "timm/densenet121"])
def test_drop_path_that_changes_nothing_is_a_warning(name: str) -> None:
    (note,) = build_model(name, 3, 32, drop_path=0.5)[1]
    assert re.match(r"warning: .*--drop-path 0.5", note)
    assert build_model(name, 3, 32, drop_path=0.0)[1] == []


@pytest.mark.parametrize(
    ("name", "dropout", "drop_path"),
    [
        ("simple_cnn", 0.2, 0.0),
        ("resnet18", 0.0, 0.0),
        ("efficientnet_b0", 0.2, 0.1875),
        ("timm/resnet18", 0.0, 0.0),
        ("timm/efficientnet_b0", 0.0, 0.0),
    ],
)
def test_the_architectures_own_rates_are_read(name: str, dropout: float, drop_path: float) -> None:
    network = create(name, 3, 32)
    assert (dropout_of(network), drop_path_of(network)) == (dropout, pytest.approx(drop_path))
    assert set_dropout(network, 0.3) == 0 or dropout_of(network) == 0.3

"""Layers by depth: every parameter once, from the input to the head, for each kind of network."""

import copy
from functools import cache

import pytest
import timm
import torch
import torchvision
from torch import nn

from train.models.layers import freeze, head_names, layer_groups
from train.models.zoo import SimpleCNN

GROUPS = {
    "simple_cnn": 6,
    "alexnet": 8,
    "vgg11_bn": 11,
    "googlenet": 13,
    "inception_v3": 17,
    "resnet18": 10,
    "densenet121": 63,
    "resnext50_32x4d": 18,
    "mnasnet0_5": 21,
    "efficientnet_b0": 19,
    "mobilenet_v3_small": 15,
    "convnext_tiny": 23,
    "vit_b_16": 14,
    "swin_t": 17,
    "timm/caformer_s18": 7,
    "timm/senet154": 52,
    "timm/legacy_seresnet18": 10,
    "timm/nasnetalarge": 20,
    "timm/tf_efficientnet_lite0": 18,
    "timm/densenet121": 60,
    "timm/convnext_atto": 14,
    "timm/vit_tiny_patch16_224": 14,
    "timm/deit_tiny_distilled_patch16_224": 14,
    "timm/swin_tiny_patch4_window7_224": 14,
}


@cache
def network(name: str, num_classes: int = 7) -> nn.Module:
    """Without memory for its weights."""
    with torch.device("meta"):
        if name == "simple_cnn":
            return SimpleCNN(num_classes)
        if name.startswith("timm/"):
            built: nn.Module = timm.create_model(name.removeprefix("timm/"), num_classes=num_classes)
            return built
        no_init = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **no_init)


@pytest.mark.parametrize("name", GROUPS)
def test_every_parameter_is_in_one_group(name: str) -> None:
    groups = layer_groups(network(name))
    names = [parameter for group in groups for parameter in group]
    assert sorted(names) == sorted(parameter for parameter, _ in network(name).named_parameters())
    assert len(groups) == GROUPS[name]
    assert all(groups)


@pytest.mark.parametrize("name", [*GROUPS, "timm/iformer_m_distilled", "timm/volo_d1_224"])
def test_the_head_is_what_the_number_of_classes_shapes(name: str) -> None:
    other = dict(network(name, 11).named_parameters())
    shaped = [k for k, v in network(name).named_parameters() if v.shape != other[k].shape]
    assert head_names(network(name)) == layer_groups(network(name))[-1] == shaped


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_in_the_order_of_the_forward_pass(name: str) -> None:
    """No layer runs after one of a later group."""
    net = network(name).eval()
    group_of = {k.rpartition(".")[0]: i for i, group in enumerate(layer_groups(net)) for k in group}
    seen: list[int] = []
    handles = [
        module.register_forward_pre_hook(lambda _, __, i=group_of[path]: seen.append(i))
        for path, module in net.named_modules()
        if path in group_of
    ]
    with torch.no_grad():
        net(torch.zeros(2, 3, 224, 224, device="meta"))
    for handle in handles:
        handle.remove()
    assert seen == sorted(seen)
    assert {*seen} == {*range(len(layer_groups(net)))}


def test_what_else_an_auxiliary_head_has_is_not_head() -> None:
    groups = layer_groups(network("googlenet"))
    assert groups[-1] == [
        f"{layer}.{p}" for layer in ("aux1.fc2", "aux2.fc2", "fc") for p in ("weight", "bias")
    ]
    assert "aux1.fc1.weight" in groups[-2]


def test_normalisation_goes_with_its_layer() -> None:
    first, second, *_ = layer_groups(network("vgg11_bn"))
    assert first == [f"features.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")]
    assert second[0] == "features.4.weight"
    stem, *_, last, _ = layer_groups(network("vit_b_16"))
    assert {"class_token", "encoder.pos_embedding", "conv_proj.weight"} <= set(stem)
    assert "encoder.ln.weight" in last


# freezing


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "timm/tf_efficientnet_lite0", "vit_b_16"])
@pytest.mark.parametrize("count", [1, 4, -1])
def test_the_first_groups_are_frozen(name: str, count: int) -> None:
    net = copy.deepcopy(network(name))
    groups = layer_groups(net)
    freeze(net, count)
    frozen = groups[:count]
    for group in groups:
        for parameter in group:
            assert net.get_parameter(parameter).requires_grad == (group not in frozen)


def test_modules_are_frozen_whole_or_not_at_all() -> None:
    net = copy.deepcopy(network("timm/tf_efficientnet_lite0"))
    paths, last = freeze(net, 3)
    assert paths == ("conv_stem", "bn1", "blocks.0", "blocks.1.0")
    assert last.startswith("blocks.1.0.")


@pytest.mark.parametrize("count", [10, 99])
def test_freezing_everything_is_an_error_with_the_limit(count: int) -> None:
    with pytest.raises(ValueError, match=f"--freeze {count}.* 10 .* 9, or -1"):
        freeze(copy.deepcopy(network("resnet18")), count)

"""Pretrained tensors: all that fits is loaded, heads follow the classes, what does not fit is an error."""

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor
from train_data import build

from train.checkpoint import save_checkpoint
from train.config import TrainConfig
from train.models.build import build_model
from train.models.layers import head_names
from train.models.transfer import transfer
from train.models.zoo import create


def trained_state(classes: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return dict(build_model("simple_cnn", classes, 32)[0].network.state_dict())


def save_plain(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "w.pt")
    return folder / "w.pt"


def save_nested(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 1}, folder / "w.pth")
    return folder / "w.pth"


def save_safe(state: dict[str, Tensor], folder: Path) -> Path:
    safetensors.torch.save_file(state, folder / "w.safetensors")
    return folder / "w.safetensors"


def save_run(
    state: dict[str, Tensor], folder: Path, classes: tuple[str, ...] = ("ant", "bee", "cow")
) -> Path:
    """A checkpoint of ours; the average is what counts."""
    config = TrainConfig(model="simple_cnn", image_size=32)
    model = build(classes=state["classifier.3.weight"].shape[0])
    other = {name: value.clone() for name, value in model.state_dict().items()}
    model.network.load_state_dict(state)
    content = {"model": other, "ema": model.state_dict(), "class_names": list(classes)}
    context = {"config": config.to_dict(), "preprocess": config.preprocess().to_dict()}
    save_checkpoint(content | context, folder / "best.pt")
    return folder / "best.pt"


SAVERS = [save_plain, save_nested, save_run, save_safe]
CLASSES = ("ant", "bee", "cow")


@pytest.mark.parametrize("save", SAVERS)
def test_weights_are_loaded_from_a_file(tmp_path: Path, save: Any) -> None:
    state = trained_state()
    file = save(state, tmp_path)
    model, notes = build_model("simple_cnn", 3, 32, str(file), class_names=CLASSES)
    assert all(torch.equal(value, state[name]) for name, value in model.network.state_dict().items())
    assert len(notes) == 1
    assert f"{file}: {len(state)} of {len(state)} tensors" in notes[0]
    assert "head kept" in notes[0]
    assert ("unknown" in notes[0]) == (save is not save_run)


@pytest.mark.parametrize("save", SAVERS)
def test_weights_of_another_number_of_classes_get_a_new_head(tmp_path: Path, save: Any) -> None:
    state = trained_state(classes=10)
    model, notes = build_model("simple_cnn", 3, 32, str(save(state, tmp_path)), class_names=CLASSES)
    same = {name for name, value in model.network.state_dict().items() if value.equal(state[name])}
    assert set(state) - same == {"classifier.3.weight", "classifier.3.bias"}
    assert "new head: classifier.3" in notes[0]


@pytest.mark.parametrize("classes", [("ant", "bee", "dog"), ("bee", "ant", "cow")])
def test_a_head_of_other_classes_is_not_kept_though_it_fits(
    tmp_path: Path, classes: tuple[str, ...]
) -> None:
    state = trained_state()
    file = save_run(state, tmp_path, classes)
    model, notes = build_model("simple_cnn", 3, 32, str(file), class_names=CLASSES)
    assert not torch.equal(model.network.classifier[3].weight, state["classifier.3.weight"])
    assert re.search(f"new head: classifier.3.*{', '.join(classes)}", notes[0])


def test_a_file_without_a_head_gets_a_new_one(tmp_path: Path) -> None:
    state = {k: v for k, v in trained_state().items() if not k.startswith("classifier")}
    _, notes = build_model("simple_cnn", 3, 32, str(save_plain(state, tmp_path)))
    assert re.search("30 of 32.*new head: classifier.3", notes[0])


def test_weights_that_are_not_used_are_named(tmp_path: Path) -> None:
    file = save_plain({**trained_state(), "extra.weight": torch.ones(2)}, tmp_path)
    assert "not used: extra.weight" in build_model("simple_cnn", 3, 32, str(file))[1][0]


@pytest.mark.parametrize("name", ["simple_cnn", "timm/tf_efficientnet_lite0", "googlenet"])
def test_a_new_head_starts_at_zero(name: str) -> None:
    """A random one of timm's has logits of several units for few classes, and its gradients are noise."""
    network = create(name, 2, 64)
    transfer(network, name, dict(create(name, 10, 64).state_dict()), "w", ())
    assert all(not network.get_parameter(parameter).any() for parameter in head_names(network))
    others = [p for k, p in network.named_parameters() if p.ndim > 1 and k not in head_names(network)]
    assert all(p.any() for p in others)


def test_all_heads_of_googlenet_are_new_and_auxiliary_branches_may_be_missing() -> None:
    network = create("googlenet", 3, 64)
    state = dict(
        torchvision.models.googlenet(weights=None, num_classes=10, init_weights=False).state_dict()
    )
    note = transfer(network, "googlenet", state, "w", ())
    assert "new head: aux1.fc2, aux2.fc2, fc" in note
    without = {k: v for k, v in state.items() if not k.startswith("aux")}
    note = transfer(network, "googlenet", without, "w", ())
    assert re.search("not in .*: aux1.conv.conv.weight, aux1.conv.bn.weight, aux1.conv.bn.bias and", note)
    assert torch.equal(network.conv1.conv.weight, state["conv1.conv.weight"])


def test_files_older_than_counts_of_batches_are_taken() -> None:
    state = {k: v for k, v in trained_state().items() if "num_batches" not in k}
    network = create("simple_cnn", 3, 32)
    transfer(network, "simple_cnn", state, "w", ())
    assert torch.equal(network.get_parameter("features.0.weight"), state["features.0.weight"])


def test_torchvisions_old_names_of_densenet_are_translated() -> None:
    network = create("densenet121", 3, 32)
    state = create("densenet121", 3, 32).state_dict()
    old = {}
    for name, value in state.items():
        for kind in ("norm", "conv"):
            for i in "12":
                name = name.replace(f".{kind}{i}.", f".{kind}.{i}.") if "denselayer" in name else name
        old[name] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert transfer(network, "densenet121", old, "w", ()).startswith(f"w: {len(state)} of {len(state)}")


@pytest.mark.parametrize("name", ["mnasnet0_5", "timm/resnet10t"])
def test_weights_of_other_libraries_networks_are_loaded(name: str) -> None:
    state = dict(create(name, 10, 64).state_dict())
    assert "new head: " in transfer(create(name, 3, 64), name, state, "w", ())


# what does not fit


def other_network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return create("squeezenet1_1", 3, 64).state_dict()


def without_a_layer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != "features.4.weight"}


def other_channels(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "features.0.weight": torch.ones(32, 1, 3, 3)}


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (other_network, "features"),
        (without_a_layer, "features.4.weight"),
        (other_channels, r"features.0.weight .*\[32, 1, 3, 3\].*\[32, 3, 3, 3\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_what_is_missing_is_named(
    tmp_path: Path, change: Any, missing: str
) -> None:
    file = save_plain(change(trained_state()), tmp_path)
    with pytest.raises(ValueError, match=f"--weights '.*w.pt'.*simple_cnn.*{missing}"):
        build(weights=str(file))


def not_finite(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "features.5.running_var": torch.full((64,), torch.nan)}


def quantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Integers whose scales are elsewhere, as bitsandbytes and torch's own quantisation have them."""
    kept = torch.quantize_per_tensor(state["features.4.weight"], 0.1, 0, torch.qint8)
    return {
        **state,
        "features.0.weight": torch.ones(32, 3, 3, 3, dtype=torch.int8),
        "features.4.weight": kept,
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [(not_finite, "1 .*features.5.running_var"), (quantised, "2 .*features.0.weight .*int8.*qint8")],
)
def test_weights_of_no_use_are_refused_and_named(tmp_path: Path, change: Any, named: str) -> None:
    file = save_plain(change(trained_state()), tmp_path)
    with pytest.raises(ValueError, match=f"--weights '.*w.pt'.* {named}"):
        build(weights=str(file))


def test_half_precision_and_counts_that_were_averaged_are_taken(tmp_path: Path) -> None:
    state = trained_state()
    half = {key: value.half() for key, value in state.items()}
    model, _ = build_model("simple_cnn", 3, 32, str(save_plain(half, tmp_path)))
    assert model.network.features[0].weight.equal(half["features.0.weight"].float())
    assert model.network.features[0].weight.dtype == torch.float32


def test_a_deeper_network_that_has_all_tensors_is_refused() -> None:
    """Without its further blocks it is hardly better than a random one."""
    state = create("resnet34", 3, 64).state_dict()
    with pytest.raises(ValueError, match=r"--weights 'w'.* resnet18.*deeper.*layer1\.2\..*--model"):
        transfer(create("resnet18", 3, 64), "resnet18", state, "w", ())


@pytest.mark.parametrize(
    ("name", "holder", "further"),
    [
        ("tf_efficientnet_lite0", "tf_efficientnet_b0", r"blocks\.0\.0\.se\."),
        ("timm/resnet18", "timm/seresnet18", r"layer1\.0\.se\."),
        (
            "timm/vit_tiny_patch16_224",
            "timm/vit_tiny_patch16_224 with layer scale",
            r"blocks\.0\.ls1\.gamma",
        ),
    ],
)
def test_a_network_with_more_in_its_blocks_is_refused(name: str, holder: str, further: str) -> None:
    """Without squeeze-and-excitation or layer scale, all features that follow are others."""
    base, _, scale = holder.removeprefix("timm/").partition(" ")
    options = {"init_values": 1e-5} if scale else {}
    state = timm.create_model(base, num_classes=3, **options).state_dict()
    with pytest.raises(ValueError, match=f"--weights 'w'.* {name}.*{further}.*--model"):
        transfer(create(name, 3, 224), name, state, "w", ())


def test_buffers_that_a_network_lacks_are_no_layers_of_it() -> None:
    name = "timm/swin_tiny_patch4_window7_224"
    state = dict(create(name, 3, 224).state_dict()) | {"layers.0.blocks.1.old_mask": torch.zeros(2)}
    assert "not used: layers.0.blocks.1.old_mask" in transfer(create(name, 3, 224), name, state, "w", ())


def test_volos_second_head_is_new_for_other_classes() -> None:
    name = "timm/volo_d1_224"
    state = create(name, 10, 64).state_dict()
    network = create(name, 3, 64)
    assert "new head: aux_head, head" in transfer(network, name, state, "w", ())
    assert not network.aux_head.weight.any()


def test_a_longer_head_is_no_deeper_network() -> None:
    state = dict(create("alexnet", 3, 64).state_dict()) | {"classifier.8.weight": torch.ones(3, 3)}
    assert "not used: classifier.8.weight" in transfer(create("alexnet", 3, 64), "alexnet", state, "w", ())


def test_a_file_without_any_tensor_is_no_training_from_random_weights(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="--weights"):
        build(weights=str(tmp_path / "w.pt"))


def test_weights_of_a_vit_at_another_size_are_refused(tmp_path: Path) -> None:
    """Its position embeddings differ in shape; starting them anew would not be these weights."""
    file = save_plain(create("vit_tiny_patch16_224", 3, 32).state_dict(), tmp_path)
    with pytest.raises(ValueError, match=r"--weights .* 1 of .*pos_embed.* --image-size"):
        build("vit_tiny_patch16_224", 3, 64, weights=str(file))


@pytest.mark.parametrize(
    ("holder", "given"),
    [("timm/efficientnet_b0", "efficientnet_b0"), ("efficientnet_b0", "timm/efficientnet_b0")],
)
def test_the_other_librarys_file_of_the_same_name_is_refused_with_its_name(holder: str, given: str) -> None:
    state = dict(create(holder, 3, 64).state_dict())
    with pytest.raises(ValueError, match=f"--weights .*{given}.*--model {holder} "):
        transfer(create(given, 3, 64), given, state, "w", ())


@pytest.mark.parametrize("given", ["vit_tiny_patch16_224", "timm/vit_tiny_patch16_224", "simple_cnn"])
def test_no_other_library_is_named_that_has_no_such_network(given: str) -> None:
    with pytest.raises(ValueError, match=f"--weights .*{given}.*give this network's weights$"):
        transfer(create(given, 3, 64), given, {"fc.weight": torch.ones(3, 4)}, "w", ())


def test_a_checkpoint_of_another_network_names_it(tmp_path: Path) -> None:
    file = save_run(trained_state(), tmp_path)
    with pytest.raises(ValueError, match=r"best.pt'.* --model simple_cnn"):
        build("resnet18", weights=str(file))


def test_an_empty_file_of_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="--weights"):
        transfer(create("simple_cnn", 3, 32), "simple_cnn", {}, "w", ())


def test_timms_adapted_head_is_the_only_thing_new() -> None:
    network = timm.create_model("resnet10t", num_classes=3)
    state = dict(timm.create_model("resnet10t", num_classes=5).state_dict())
    transfer(network, "timm/resnet10t", state, "w", ())
    differing = {k for k, v in network.state_dict().items() if not torch.equal(v, state[k])}
    assert differing == {"fc.weight", "fc.bias"}

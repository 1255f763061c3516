"""Checkpoints of other training scripts: which state dict and prefix are taken, and what is refused."""

import fractions
import os
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from train.models.build import build_model
from train.models.state_dict import find_prefix, load_pickle, select_state
from train.models.zoo import create

State = dict[str, Tensor]


def network_of(name: str, seed: int = 7) -> nn.Module:
    """Random weights and batch statistics, so that no two networks have equal logits by chance."""
    torch.manual_seed(seed)
    network = create(name, 3, 64)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


def assert_loaded(name: str, file: Path, expected: nn.Module, *reported: str) -> None:
    """The logits are `expected`'s, and the line on the weights has each of `reported`."""
    model, notes = build_model(name, 3, 64, str(file))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model.network.eval()(images), expected(images))
    assert len(notes) == 1
    count = len(expected.state_dict())
    assert f"{count} of {count} tensors" in notes[0]
    for text in reported:
        assert text in notes[0]
    assert "not used" not in notes[0]


def namespace(**values: Any) -> Namespace:
    return Namespace(lr=0.1, output_dir=Path("/runs"), metric=np.float64(0.5), betas=[0.9, 0.99], **values)


# training scripts


@pytest.mark.parametrize("average", [True, False])
def test_timms_training_script(tmp_path: Path, average: bool) -> None:
    network, averaged = network_of("timm/test_resnet"), network_of("timm/test_resnet", 8)
    ema = ModelEmaV3(network)
    ema.module.load_state_dict(averaged.state_dict())
    saver = CheckpointSaver(
        network,
        torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
        args=namespace(model="test_resnet"),
        model_ema=ema if average else None,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=np.float64(51.5))
    if average:
        taken = ("moving average 'state_dict_ema'", "not from 'state_dict'")
        assert_loaded("timm/test_resnet", tmp_path / "last.pth.tar", averaged, *taken)
    else:
        assert_loaded("timm/test_resnet", tmp_path / "last.pth.tar", network, "'state_dict'")


@pytest.mark.parametrize("average", [True, False])
def test_torchvisions_references(tmp_path: Path, average: bool) -> None:
    network, averaged = network_of("shufflenet_v2_x0_5"), network_of("shufflenet_v2_x0_5", 8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    content = {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 3,
        "args": namespace(model="shufflenet_v2_x0_5"),
    }
    if average:
        content["model_ema"] = AveragedModel(averaged, use_buffers=True).state_dict()
        assert "n_averaged" in content["model_ema"]
    torch.save(content, tmp_path / "checkpoint.pth")
    taken = ("'model_ema'", "not from 'model'", "'module.'") if average else ("from 'model'",)
    expected = averaged if average else network
    assert_loaded("shufflenet_v2_x0_5", tmp_path / "checkpoint.pth", expected, *taken)


@pytest.mark.parametrize("prefix", ["model.", "net.", "model._orig_mod."])
def test_lightnings_modules(tmp_path: Path, prefix: str) -> None:
    network = network_of("simple_cnn")
    content = {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"{prefix}{key}": value for key, value in network.state_dict().items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [torch.optim.AdamW(network.parameters()).state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "folder": Path("/data"), "args": namespace()},
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert_loaded("simple_cnn", tmp_path / "last.ckpt", network, "'state_dict'", repr(prefix))


# wrappers


class Wrapper(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.timm_model = network


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (compiled, "_orig_mod."),
        (nn.DataParallel, "module."),
        (lambda network: nn.DataParallel(compiled(network)), "module._orig_mod."),
        (lambda network: compiled(nn.DataParallel(network)), "_orig_mod.module."),
        (lambda network: nn.DataParallel(Wrapper(network)), "module.timm_model."),
    ],
)
def test_wrappers(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module], prefix: str) -> None:
    network = network_of("simple_cnn")
    torch.save(wrap(network).state_dict(), tmp_path / "w.pt")
    assert_loaded("simple_cnn", tmp_path / "w.pt", network, repr(prefix))


def test_a_network_without_a_wrapper_keeps_its_names(tmp_path: Path) -> None:
    """All names of such a file have a first part in common, which is the network's own."""
    network = network_of("simple_cnn")
    state = {key: value for key, value in network.state_dict().items() if key.startswith("features.")}
    torch.save(state, tmp_path / "w.pt")
    model, notes = build_model("simple_cnn", 3, 64, str(tmp_path / "w.pt"))
    assert all(torch.equal(model.network.get_parameter(k), v) for k, v in state.items() if "weight" in k)
    assert "prefix" not in notes[0]


# which of several


def test_of_two_networks_the_one_whose_shapes_fit_is_taken() -> None:
    student, teacher = (timm.create_model(name, num_classes=3) for name in ("test_resnet", "resnet10t"))
    both = {
        f"{prefix}.{key}": value
        for prefix, network in {"teacher": teacher, "student": student}.items()
        for key, value in network.state_dict().items()
    }
    assert find_prefix(both, student.state_dict()) == "student."
    assert find_prefix(both, teacher.state_dict()) == "teacher."


def test_two_networks_that_fit_are_refused_and_named(tmp_path: Path) -> None:
    state = network_of("simple_cnn").state_dict()
    torch.save({f"{p}.{k}": v for k, v in state.items() for p in ("online", "target")}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"--weights '.*w.pt'.*'online.', 'target.'"):
        build_model("simple_cnn", 3, 64, str(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("keys", "taken", "others"),
    [
        (["state_dict", "state_dict_ema"], ["state_dict_ema"], ["state_dict"]),
        (["model", "model_ema", "ema"], ["ema"], ["model_ema", "model"]),
        (["model"], ["model"], []),
        (["student"], [], []),
    ],
)
def test_averages_come_before_weights(keys: list[str], taken: list[str], others: list[str]) -> None:
    content = {key: {"weight": torch.full((1,), i)} for i, key in enumerate(keys)}
    state, *reported = select_state(content)
    assert reported == [taken, others]
    assert state == (content[taken[0]] if taken else content)


def test_a_state_dict_within_another_entry_is_found_also_in_a_file_that_holds_itself() -> None:
    state = {"weight": torch.ones(1)}
    assert select_state({"model": {"state_dict": state}}) == (state, ["model", "state_dict"], [])
    content: dict[str, Any] = {}
    content["model"] = content
    select_state(content)


def test_an_entry_without_tensors_is_not_taken() -> None:
    content = {
        "ema": None,
        "model_ema": {},
        "model": {"name": "resnet18"},
        "state_dict": {"a": torch.ones(1)},
    }
    assert select_state(content)[1:] == (["state_dict"], [])


@pytest.mark.parametrize("key", ["model_state_dict", "net", "student"])
def test_a_state_dict_under_any_name_is_found(tmp_path: Path, key: str) -> None:
    network = network_of("simple_cnn")
    optimizer = torch.optim.AdamW(network.parameters())
    content = {"epoch": 3, key: network.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    torch.save(content, tmp_path / "w.pt")
    assert_loaded("simple_cnn", tmp_path / "w.pt", network, repr(f"{key}."))


def test_of_two_networks_under_other_names_none_is_taken(tmp_path: Path) -> None:
    state = network_of("simple_cnn").state_dict()
    torch.save(
        {"student": state, "teacher": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt"
    )
    with pytest.raises(ValueError, match=r"--weights '.*w.pt'.*'student.', 'teacher.module.'"):
        build_model("simple_cnn", 3, 64, str(tmp_path / "w.pt"))


# what is refused


def test_keys_of_a_file_without_tensors_are_named(tmp_path: Path) -> None:
    torch.save({"config": {"lr": 0.1}, "step": 3}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"--weights '.*w.pt'.*features.0.weight.*config, step"):
        build_model("simple_cnn", 3, 64, str(tmp_path / "w.pt"))


def test_another_network_whose_names_end_alike_is_no_choice_of_networks(tmp_path: Path) -> None:
    blocks = {f"blocks.{i}.conv1.weight": torch.ones(64, 3, 7, 7) for i in range(4)}
    torch.save(blocks, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"--weights '.*w.pt' do not fit resnet18.*blocks.0.conv1.weight"):
        build_model("resnet18", 3, 64, str(tmp_path / "w.pt"))


def test_keys_of_another_networks_tensors_are_named(tmp_path: Path) -> None:
    torch.save({"stem.a": torch.ones(1), 3: torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"--weights '.*w.pt'.*features.0.weight.*stem.a"):
        build_model("simple_cnn", 3, 64, str(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("value", "type_name"),
    [
        (fractions.Fraction(1, 2), "fractions.Fraction"),
        (torchvision.transforms.InterpolationMode.BILINEAR, "InterpolationMode"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (namespace(call=os.system), "system"),
    ],
)
@pytest.mark.parametrize("new", [True, False])
def test_other_types_are_refused_with_their_name_and_the_way_out(
    tmp_path: Path, value: Any, type_name: str, new: bool
) -> None:
    state = network_of("simple_cnn").state_dict()
    torch.save({"state_dict": state, "args": value}, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"--weights .*w\.pt") as error:
        build_model("simple_cnn", 3, 64, str(tmp_path / "w.pt"))
    assert type_name in str(error.value)
    way_out = re.search(r"torch\.save\(.*\['state_dict'\], NEW\)", str(error.value))
    assert way_out
    names = {"torch": torch, "FILE": tmp_path / "w.pt", "NEW": tmp_path / "new.pt"}
    exec(way_out.group(), names)
    build_model("simple_cnn", 3, 64, str(tmp_path / "new.pt"))


class MakesFolder:
    """What a hostile file has in place of a Namespace's values."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Namespace, (os.mkdir,)


def test_types_that_are_ignored_are_neither_built_nor_a_way_to_others(tmp_path: Path) -> None:
    torch.save({"args": namespace(), "path": PurePosixPath("/a")}, tmp_path / "w.pt")
    before = set(torch.serialization.get_safe_globals())
    content = load_pickle(tmp_path / "w.pt")
    assert not isinstance(content["args"], Namespace)
    assert not vars(content["args"])
    assert not isinstance(content["path"], PurePath)
    torch.save({"args": MakesFolder()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="mkdir"):
        load_pickle(tmp_path / "w.pt")
    assert set(torch.serialization.get_safe_globals()) == before


def test_numpys_arrays_and_scalars_are_ignored(tmp_path: Path) -> None:
    network = network_of("simple_cnn")
    values = [np.float32(1), np.int64(2), np.bool_(True), np.arange(3), np.array([0.5])]
    content = {"values": values, "class_names": np.array(["a", "b", "c"]), "model": network.state_dict()}
    torch.save(content, tmp_path / "w.pt")
    assert_loaded("simple_cnn", tmp_path / "w.pt", network, "'model'")

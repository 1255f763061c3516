"""Tensors in checkpoints of timm, torchvision, Lightning and wrappers, read without running their code."""

import pickle
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve.contract.errors import UserError

AVERAGES = ("ema", "state_dict_ema", "model_ema")
ENTRIES = (*AVERAGES, "model", "state_dict")  # keys that hold a state dict, in the order of preference
PATH_TYPES = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
# Types that training scripts save beside the tensors. None of them is imported or built: see _Ignored.
IGNORED_TYPES = (
    "argparse.Namespace",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in PATH_TYPES),
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
)
# FILE and NEW are for the user to fill in
WAY_OUT = (
    "if you trust the file, save its state dict alone where they can be imported: "
    "torch.save(torch.load(FILE, map_location='cpu', weights_only=False)['state_dict'], NEW), "
    "with ['model'] if that is its key, or .state_dict() if FILE holds a whole network"
)


class _Ignored:
    """Stand-in for a value of IGNORED_TYPES, which keeps nothing of it."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_pickle(path: Path) -> Any:
    """Return what a file of torch.save holds: tensors and plain values; those of IGNORED_TYPES are empty.
    Raises UserError for something of another type, and any error of torch.load for a damaged file."""
    with torch.serialization.safe_globals([(_Ignored, name) for name in IGNORED_TYPES]):
        try:
            with path.open("rb") as file:  # of a path, torch believes the suffix
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            try:
                types = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
            except Exception:  # any, for a file that is damaged or has another format
                types = re.findall(r"GLOBAL (\S+) w", str(error))  # the first, in torch's old format
            if not types:
                raise
            names = ", ".join(sorted(types))
            raise UserError(
                f"holds objects that could run code, and is not read: {names}; {WAY_OUT}"
            ) from error


def select_state(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return a checkpoint's state dict, the moving average if there is one; the keys that lead to it; and
    those of the state dicts beside it."""
    taken: list[str] = []
    others: list[str] = []
    for _ in range(2):  # a file may hold itself
        parts = {key: content.get(key) for key in ENTRIES}
        found = [key for key, part in parts.items() if isinstance(part, Mapping) and tensors_of(part)]
        if found:
            taken.append(found[0])
            others += found[1:]
            content = content[found[0]]
    return dict(content), taken, others


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state dict by name, and those of mappings in it as KEY.NAME, but none of
    another run's detector."""
    inner = {key: part for key, part in state.items() if isinstance(part, Mapping)}
    items = [*state.items(), *((f"{key}.{n}", part[n]) for key, part in inner.items() for n in part)]
    return {
        key: value
        for key, value in items
        if isinstance(value, Tensor) and isinstance(key, str) and not key.startswith("subject.")
    }


def fits(tensor: Tensor, own: Tensor) -> bool:
    """Return whether a tensor can take the place of the network's own: of its shape, and where its own are
    floats, of dense numbers that are not quantised, whose scale is elsewhere."""
    is_number = tensor.is_floating_point() and tensor.itemsize > 1 and tensor.layout == torch.strided
    return tensor.shape == own.shape and (is_number or not own.is_floating_point())


def find_prefix(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return the prefix below which most tensors fit the network's `own`, and then have a name of theirs.
    Raises UserError, which names them, if two prefixes have as many."""
    named: Counter[str] = Counter()
    fitting: Counter[str] = Counter()
    for key, tensor in tensors.items():
        parts = key.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[i:])
            if name in own:
                prefix = key.removesuffix(name)
                named[prefix] += 1
                fitting[prefix] += fits(tensor, own[name])
    best = max(((fitting[prefix], named[prefix]) for prefix in named), default=(0, 0))
    if 2 * best[1] < len(own):  # another network, some of whose names end alike
        return ""
    prefixes = [prefix for prefix in named if (fitting[prefix], named[prefix]) == best]
    if len(prefixes) > 1:
        raise UserError(
            f"holds more than one network that fits, with the prefixes {', '.join(map(repr, prefixes))}; "
            "save the tensors of one alone"
        )
    return prefixes[0]

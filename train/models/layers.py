"""Groups of a network's layers by depth, for freezing, learning rates by layer and a new head."""

from typing import Any

from timm.models import group_parameters
from torch import nn

from serve.contract.errors import UserError

# Modules that are only a list of layers, and those of torchvision whose forward is hardly more than one.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
STAGES = ("Encoder", "MaxVitBlock")


def layer_groups(network: nn.Module) -> list[list[str]]:
    """Return the names of all parameters, each once, grouped by depth from the input to the output.

    A group is a block of the architecture (a residual or dense block, a transformer layer, a cell), or a
    convolution or linear layer where there are no blocks; normalisation is in its layer's group. The last
    group is the head: the layers whose shape follows the number of classes, auxiliary ones included. The
    rest of an auxiliary head is in the group before.
    """
    head = set(head_names(network))
    names = [name for name, _ in network.named_parameters()]
    matcher: Any = getattr(network, "group_matcher", None)  # timm's own, for its layer-wise decay
    if matcher:
        by_depth = group_parameters(network, matcher())
        groups = [by_depth[depth] for depth in sorted(by_depth)]
    else:
        groups = _split(network)
        groups[0] += [name for name, _ in network.named_parameters(recurse=False)]  # a class token
    beside = {name for name in names if is_auxiliary(name)}
    body = [[name for name in group if name not in head | beside] for group in groups]
    body = [group for group in body if group]
    if beside:
        body[-1] += [name for name in names if name in beside - head]
    ndim = {name: parameter.ndim for name, parameter in network.named_parameters()}
    if len(body) > 1 and all(ndim[name] <= 1 for name in body[-1]):  # the last normalisation alone
        last = body.pop()
        body[-1] += last
    return [*body, [name for name in names if name in head]]


def head_names(network: nn.Module) -> list[str]:
    """Return the parameter names of the layers that give the logits, auxiliary heads included."""
    get_classifier: Any = getattr(network, "get_classifier", None)  # timm's
    if get_classifier:
        classifier = get_classifier()  # a few networks have two
        ends = [classifier] if isinstance(classifier, nn.Module) else list(classifier)
        ends += [child for name, child in network.named_children() if is_auxiliary(name)]  # VOLO's
    else:
        children = [(name, child) for name, child in network.named_children() if _has_parameters(child)]
        ends = [child for name, child in children[:-1] if is_auxiliary(name)] + [children[-1][1]]
    num_classes = getattr(network, "num_classes", None)
    ids = {id(p) for end in ends for layer in _logit_layers(end, num_classes) for p in layer.parameters()}
    return [name for name, parameter in network.named_parameters() if id(parameter) in ids]


def freeze(network: nn.Module, count: int) -> tuple[tuple[str, ...], str]:
    """Turn off gradients of the first `count` groups (-1: of all but the head); return the paths of the
    modules that are frozen whole, and the name of the last frozen parameter. Raises UserError if there are
    not so many groups besides the head."""
    groups = layer_groups(network)
    if count >= len(groups):
        raise UserError(
            f"--freeze {count} leaves nothing to train: the network has {len(groups)} layer groups with "
            f"the head; freeze at most {len(groups) - 1}, or -1 for that"
        )
    fixed = groups[:-1] if count < 0 else groups[:count]
    names = {name for group in fixed for name in group}
    for name, parameter in network.named_parameters():
        if name in names:
            parameter.requires_grad = False
    paths: list[str] = []
    for path, module in network.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in paths)
        inner = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if inner and inner <= names and not inside:
            paths.append(path)
    return tuple(paths), fixed[-1][-1]


def _split(module: nn.Module, path: str = "") -> list[list[str]]:
    """Return the groups of a module's children in order, with lists of layers split further."""
    groups: list[list[str]] = []
    only_normalisation = True
    for name, child in module.named_children():
        if not _has_parameters(child):
            continue
        inner = f"{path}{name}."
        if isinstance(child, CONTAINERS) or type(child).__name__ in STAGES:
            parts = _split(child, inner)
            # a position embedding belongs to what comes before
            before = groups[-1] if groups else parts[0]
            before += [f"{inner}{parameter}" for parameter, _ in child.named_parameters(recurse=False)]
        else:
            parts = [[f"{inner}{parameter}" for parameter, _ in child.named_parameters()]]
        is_normalisation = all(parameter.ndim <= 1 for parameter in child.parameters())
        if groups and (is_normalisation or only_normalisation):
            groups[-1] += parts.pop(0)
        groups += parts
        only_normalisation &= is_normalisation
    return groups


def _logit_layers(module: nn.Module, num_classes: int | None) -> list[nn.Module]:
    """Return the layers with weights and one output for each class, or else the last with weights."""
    layers = {m: [p for p in m.parameters(recurse=False) if p.ndim > 1] for m in module.modules()}
    layers = {m: weights for m, weights in layers.items() if weights}
    fitting = [m for m, weights in layers.items() if weights[0].shape[0] == num_classes]
    return fitting or list(layers)[-1:]


def is_auxiliary(name: str) -> bool:
    """Return whether a parameter is in GoogLeNet's aux1, aux2, Inception's AuxLogits or VOLO's aux_head."""
    return name.partition(".")[0].lower().startswith("aux")


def _has_parameters(module: nn.Module) -> bool:
    return next(iter(module.parameters()), None) is not None

"""Muon whose steps take few launches and do not wait for the device."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from timm.optim import muon
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from train.distributed import Ranks, gather_parts

WIDE = 1.5  # times as wide as high: matrices whose products with themselves are cheaper to iterate
STACKED = 2**23  # numbers in a stack of several matrices: 32 MB for each temporary tensor

Group = dict[str, Any]


class Muon(muon.Muon):
    """timm's Muon, with its settings, its arithmetic and its state, in few launches for a GPU.

    Matrices of equal shape are orthogonalised together, each by one of the ranks, which have the same
    gradients; torch's fused kernels do the rest. As torch's own fused optimizers, it divides the gradients
    by `grad_scale` and skips a step where `found_inf` is 1, which the device alone has to know: weights and
    state then stay as they are. Biases and the like are changed as by AdamW, also with `nesterov` (timm:
    NAdamW). It has of timm's variants neither spatial batches nor AdaMuon.
    """

    _step_supports_amp_scaling = True  # torch's mark of optimizers that heed both

    def __init__(
        self, groups: list[Group], dtype: torch.dtype, ranks: Ranks | None = None, **settings: Any
    ):
        """`dtype` is that of the orthogonalisation, which the ranks share; `settings` are timm's."""
        super().__init__(groups, **settings)
        self.dtype, self.ranks = dtype, ranks or Ranks()
        # made now, as a skipped first step must find it
        for parameter in (p for group in self.param_groups for p in group["params"]):
            is_matrix = muon._is_suitable_for_muon(parameter)  # no public function decides it
            names = ("momentum_buffer",) if is_matrix else ("exp_avg", "exp_avg_sq")
            state: dict[str, Any] = {name: torch.zeros_like(parameter) for name in names}
            if not is_matrix:
                state["step"] = torch.zeros((), device=parameter.device)
            self.state[parameter] = {"use_muon": is_matrix, **state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load a state, also timm's, whose counters are on the CPU."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for parameter, values in self.state.items():
            for name, value in values.items():
                if name == "step":
                    values[name] = value.to(parameter.device)
                elif name != "use_muon":  # fused kernels read all memory in the order of the parameter's
                    values[name] = torch.empty_like(parameter).copy_(value)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            self._step_matrices([p for p in trained if self.state[p]["use_muon"]], group)
            self._step_others([p for p in trained if not self.state[p]["use_muon"]], group)

    def _given(self, name: str) -> Tensor | None:
        """Return grad_scale or found_inf, which GradScaler sets for a step and then deletes."""
        return getattr(self, name, None)

    def _step_matrices(self, parameters: list[Tensor], group: Group) -> None:
        """Average the gradients over the steps, and change the weights by the orthogonalised average."""
        if not parameters:
            return
        averages = [self.state[p]["momentum_buffer"] for p in parameters]
        # average + (1 - beta) * (gradient - average), as ascent along the gradient with a weight decay of 1
        rates = {"lr": 1 - group["momentum"], "weight_decay": 1.0}
        self._descend(
            averages, gradients(parameters), **rates, maximize=True, scale=self._given("grad_scale")
        )
        if group["nesterov"]:  # the gradient counts once more, which the kernel has divided by its scale
            averages = list(torch._foreach_lerp(averages, gradients(parameters), rates["lr"]))
        weights = [as_matrix(p, p) for p in parameters]
        steps = self._orthogonalised(
            [as_matrix(m, p) for m, p in zip(averages, parameters, strict=True)], group
        )
        for indices in alike([weight.shape for weight in weights]):
            scale = muon.get_lr_scale(weights[indices[0]].shape, group["adjust_lr_fn"])
            rates = {"lr": scale * group["lr"], "weight_decay": group["weight_decay"] / scale}
            changed = [weights[i] for i in indices]
            changes = [turned(steps[i], like=p).to(p.dtype) for i, p in zip(indices, changed, strict=True)]
            self._descend(changed, [change.contiguous() for change in changes], **rates)

    def _orthogonalised(self, matrices: list[Tensor], group: Group) -> dict[int, Tensor]:
        """Return the matrices orthogonalised, wider than high; each rank does a share of the work."""
        coefficients = muon.resolve_ns_coefficients(group["ns_coefficients"], muon._COEFFICIENTS)
        owned = shares(tuple(m.numel() * min(m.shape) for m in matrices), self.ranks.world_size)
        mine = owned[self.ranks.rank]
        found: dict[int, Tensor] = {}
        for stack in alike([matrices[i].shape for i in mine], STACKED):
            wide = torch.stack([turned(matrices[mine[i]]) for i in stack])
            steps = orthogonalised(wide, group["ns_steps"], coefficients, group["eps"], self.dtype)
            found |= {mine[i]: step for i, step in zip(stack, steps.unbind(), strict=True)}
        if len(owned) > 1:
            nothing = matrices[0].new_empty(0, dtype=self.dtype)
            own = torch.cat([nothing, *(found[i].flatten() for i in mine)])
            lengths = [[matrices[i].numel() for i in part] for part in owned]
            parts = gather_parts(own, [sum(part) for part in lengths])
            for indices, part, numbers in zip(owned, parts, lengths, strict=True):
                for i, step in zip(indices, torch.split(part, numbers), strict=True):
                    found[i] = step.view(turned(matrices[i]).shape)
        return found

    def _descend(
        self,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor],
        lr: float,
        weight_decay: float,
        maximize: bool = False,
        scale: Tensor | None = None,
    ) -> None:
        """Change `values` as plain gradient descent does, in one launch, unless the step is skipped."""
        sgd(
            list(values),
            list(gradients),
            [None] * len(values),
            fused=True,
            grad_scale=scale,
            found_inf=self._given("found_inf"),
            lr=lr,
            weight_decay=weight_decay,
            maximize=maximize,
            momentum=0.0,
            dampening=0.0,
            nesterov=False,
        )

    def _step_others(self, parameters: list[Tensor], group: Group) -> None:
        """Change biases, normalisation layers and the like as AdamW does."""
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            gradients(parameters),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=self._given("grad_scale"),
            found_inf=self._given("found_inf"),
            lr=group["lr"] * group["fallback_lr_scale"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            amsgrad=False,
            maximize=False,
        )


def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def orthogonalised(
    wide: Tensor,
    steps: int,
    coefficients: list[tuple[float, float, float]],
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return the Newton-Schulz iteration of matrices [N, rows, columns], rows <= columns, in `dtype`.

    Each iterate is a polynomial of X @ X.mT, [rows, rows], times the first X. Where X is much wider, that
    matrix is iterated in its place, and X takes part in two products in all, not in two an iteration.
    """
    if wide.shape[2] < WIDE * wide.shape[1]:
        return muon.zeropower_via_newtonschulz(wide, steps, coefficients, eps, dtype=dtype)
    first = wide.to(dtype, copy=True)
    first.div_(first.norm(dim=(-2, -1), keepdim=True).clamp_(min=eps))
    gram = torch.bmm(first, first.mT)
    product: Tensor | None = None
    sequence = [*coefficients, *coefficients[-1:] * steps][:steps]
    for number, (a, b, c) in enumerate(sequence, 1):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else torch.bmm(factor, product)
        if number < steps:  # polynomials of one matrix commute
            gram = torch.bmm(factor, torch.bmm(gram, factor))
    assert product is not None
    return torch.bmm(product, first)


def as_matrix(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor of a parameter's shape and strides as a view [shape[0], -1], whose columns are in the
    order of memory: orthogonalisation does not depend on theirs."""
    order = sorted(range(1, parameter.ndim), key=parameter.stride, reverse=True)
    return tensor.permute(0, *order).view(parameter.shape[0], -1)


def turned(matrix: Tensor, like: Tensor | None = None) -> Tensor:
    """Return a matrix that is wider than high, transposed if need be; or one as wide and high as `like`."""
    rows, columns = (matrix if like is None else like).shape
    return matrix if rows <= columns else matrix.mT


def alike(shapes: Sequence[torch.Size], most: float = math.inf) -> Iterator[list[int]]:
    """Yield indices of matrices of equal shape, transposed or not, which have `most` numbers together."""
    found: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        found[tuple(sorted(shape))].append(index)
    for (rows, columns), indices in found.items():
        together = int(min(len(indices), max(1, most // (rows * columns))))
        for first in range(0, len(indices), together):
            yield indices[first : first + together]


@cache
def shares(costs: tuple[int, ...], count: int) -> list[list[int]]:
    """Return which pieces of work each of `count` ranks does, of nearly equal cost in all."""
    owned: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        min(owned, key=lambda part: sum(costs[i] for i in part)).append(index)
    return owned

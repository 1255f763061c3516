"""Muon whose steps take few launches and do not wait for the device."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.optim import muon
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

STACKED = 2**23  # numbers in a stack of several matrices: 32 MB for each temporary tensor

Group = dict[str, Any]


class Muon(muon.Muon):
    """timm's Muon, with its settings, its arithmetic and its state, in few launches for a GPU.

    Matrices of equal shape are orthogonalised together, and torch's fused kernels do the rest. As torch's
    own fused optimizers, it divides the gradients by `grad_scale` and skips a step where `found_inf` is 1,
    which the device alone has to know: weights and state then stay as they are. It has no Nesterov momentum
    (timm's default, so that biases and the like are changed as by AdamW), and of timm's variants neither
    spatial batches nor AdaMuon.
    """

    _step_supports_amp_scaling = True  # torch's mark of optimizers that heed both

    def __init__(self, groups: list[Group], dtype: torch.dtype, **settings: Any):
        """`dtype` is that of the orthogonalisation, `settings` are timm's."""
        super().__init__(groups, **settings)
        self.dtype = dtype
        self._complete_state()

    def _complete_state(self) -> None:
        """Make the state of parameters that have none: a skipped first step must find it."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if self.state[parameter]:
                continue
            is_matrix = muon._is_suitable_for_muon(parameter)  # no public function decides it
            names = ("momentum_buffer",) if is_matrix else ("exp_avg", "exp_avg_sq")
            state: dict[str, Any] = {name: torch.zeros_like(parameter) for name in names}
            if not is_matrix:
                state["step"] = torch.zeros((), device=parameter.device)
            self.state[parameter] = {"use_muon": is_matrix, **state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load a state, also timm's, whose counters are on the CPU and which is made in the first step."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for parameter, values in self.state.items():
            for name, value in values.items():
                if name == "step":
                    values[name] = value.to(parameter.device)
                elif name != "use_muon":  # fused kernels read all memory in the order of the parameter's
                    values[name] = torch.empty_like(parameter).copy_(value)
        self._complete_state()

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
        averages = [self.state[p]["momentum_buffer"] for p in parameters]
        # average + (1 - beta) * (gradient - average), as ascent along the gradient with a weight decay of 1
        rates = {"lr": 1 - group["momentum"], "weight_decay": 1.0}
        self._descend(
            averages, gradients(parameters), **rates, maximize=True, scale=self._given("grad_scale")
        )
        views = [(as_matrix(p, p), as_matrix(m, p)) for p, m in zip(parameters, averages, strict=True)]
        coefficients = muon.resolve_ns_coefficients(group["ns_coefficients"], muon._COEFFICIENTS)
        for stack in stacks(views):
            wide = torch.stack([m if m.shape[0] <= m.shape[1] else m.mT for _, m in stack])
            steps = muon.zeropower_via_newtonschulz(
                wide, group["ns_steps"], coefficients, group["eps"], dtype=self.dtype
            )
            steps = steps.to(wide.dtype)
            scale = muon.get_lr_scale(steps.shape, group["adjust_lr_fn"])
            changes = [
                (s if p.shape[0] <= p.shape[1] else s.mT).contiguous()
                for s, (p, _) in zip(steps.unbind(), stack, strict=True)
            ]
            rates = {"lr": scale * group["lr"], "weight_decay": group["weight_decay"] / scale}
            self._descend([p for p, _ in stack], changes, **rates)

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


def as_matrix(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor of a parameter's shape and strides as a view [shape[0], -1], whose columns are in the
    order of memory: orthogonalisation does not depend on theirs."""
    order = sorted(range(1, parameter.ndim), key=parameter.stride, reverse=True)
    return tensor.permute(0, *order).view(parameter.shape[0], -1)


def stacks(views: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield the pairs in lists of equal shape, transposed or not, of STACKED numbers at most."""
    shapes: defaultdict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for pair in views:
        shapes[tuple(sorted(pair[0].shape))].append(pair)
    for (rows, columns), pairs in shapes.items():
        together = max(1, STACKED // (rows * columns))
        for first in range(0, len(pairs), together):
            yield pairs[first : first + together]

"""Muon's step, of timm and in stacks, in turn: seconds, and operations on tensors.

python benchmarks/muon_step.py --models resnet18 resnet50 --rounds 5

timm's is what `--optimizer muon` was built on: one matrix after the other, here too in float32. Operations
are those that torch dispatches, each of which is a launch on a GPU, or several.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from timm.optim import muon
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not benchmarks/, whose train.py would hide the package

from train.config import TrainConfig  # noqa: E402
from train.models.build import build_model  # noqa: E402
from train.models.classifier import ImageClassifier  # noqa: E402
from train.optim.optimizers import build_optimizer  # noqa: E402

VIEWS = ("view", "permute", "transpose", "unbind", "detach", "alias", "aten::t.", "expand", "diagonal")
orthogonalise = muon.zeropower_via_newtonschulz


class Operations(TorchDispatchMode):
    """Counts operations that are no views, and of fused and foreach ones each as one."""

    count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(view in op.name() for view in VIEWS)
        return op(*args, **(kwargs or {}))


def prepared(name: str, classes: int) -> ImageClassifier:
    torch.manual_seed(0)
    model, _ = build_model(name, classes, 64)
    model.to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def timm_optimizer(model: ImageClassifier) -> muon.Muon:
    ours = build_optimizer(TrainConfig(optimizer="muon"), model)
    kept = ("params", "weight_decay", "lr")
    groups = [{key: group[key] for key in kept} for group in ours.param_groups]
    shared = ("momentum", "ns_steps", "ns_coefficients", "adjust_lr_fn")
    return muon.Muon(groups, **{key: ours.defaults[key] for key in shared})


def measure(name: str, classes: int, rounds: int) -> None:
    optimizers = {
        "timm": timm_optimizer(prepared(name, classes)),
        "stacks": build_optimizer(TrainConfig(optimizer="muon"), prepared(name, classes)),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in optimizers}
    operations: dict[str, int] = {}
    for turn in range(rounds + 1):  # the first is counted, not timed
        for kind, optimizer in optimizers.items():
            used = partial(orthogonalise, dtype=torch.float32) if kind == "timm" else orthogonalise
            with patch.object(muon, "zeropower_via_newtonschulz", used):
                if not turn:
                    optimizer.step()  # timm's makes its state
                    with Operations() as counted:
                        optimizer.step()
                    operations[kind] = counted.count
                    continue
                started = time.perf_counter()
                optimizer.step()
                seconds[kind].append(time.perf_counter() - started)
    for kind, taken in seconds.items():
        listed = f"{statistics.median(taken):.3f} [{min(taken):.3f}, {max(taken):.3f}] s"
        print(f"{name}, {kind}: {listed}, {operations[kind]} operations", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {args.rounds} rounds in turn: median [lowest, highest]")
    for name in args.models:
        measure(name, args.classes, args.rounds)


if __name__ == "__main__":
    main()

"""The only place that knows ranks and process groups."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # the first scan of a large data set happens while ranks wait


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on one process of the whole job."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """What torchrun set; a plain `python train/main.py` is one process."""
    get = os.environ.get
    return Ranks(
        rank=int(get("RANK", "0")),
        local_rank=int(get("LOCAL_RANK", "0")),
        world_size=int(get("WORLD_SIZE", "1")),
        local_world_size=int(get("LOCAL_WORLD_SIZE", "1")),
    )


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """nccl on CUDA with gloo for CPU tensors, gloo elsewhere; nothing for a single process."""
    if ranks.world_size == 1:
        yield
        return
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_main(ranks: Ranks, function: Callable[[], T]) -> T:
    """Run on rank 0; every rank gets its result, or raises its error, so that none waits in vain."""
    if ranks.world_size == 1:
        return function()
    outcome: list[Any] = [None, None]
    if ranks.is_main:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def wrap(model: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """DistributedDataParallel, or the model itself in a single process.

    Buffers (batch-norm statistics) are rank 0's: they are broadcast before each forward pass, so that
    what rank 0 saves is what all ranks use.
    """
    if ranks.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Without `enabled`, gradients of this backward pass stay local (gradient accumulation)."""
    if enabled or not isinstance(model, DistributedDataParallel):
        yield
    else:
        with model.no_sync():
            yield


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def sum_over_ranks(values: Tensor) -> Tensor:
    """In place; every rank has the sum."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def max_over_ranks(value: float) -> float:
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def gather_rows(rows: Tensor, ranks: Ranks) -> Tensor | None:
    """CPU tensors [n_rank, ...] of any n_rank -> their concatenation on rank 0, None on the others."""
    if ranks.world_size == 1:
        return rows
    parts: list[Any] | None = [None] * ranks.world_size if ranks.is_main else None
    dist.gather_object(rows.numpy(), parts, dst=0)
    return torch.cat([torch.from_numpy(part) for part in parts]) if parts else None

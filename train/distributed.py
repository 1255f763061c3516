"""The only place that knows ranks and process groups."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from train.rendezvous import agree_on_attempt

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # to come together
PREPARATION_MINUTES = 24 * 60.0  # rank 0 reads, copies and decodes a data set while the others wait


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
    """nccl on CUDA with gloo for CPU tensors, gloo elsewhere; nothing for a single process.

    Its addresses are exchanged under a name that is this attempt's own: torchrun's store outlives the
    processes that it restarts, and still has those of the dead.
    """
    if ranks.world_size == 1:
        yield
        return
    shared, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    store = PrefixStore(f"purebred/{agree_on_attempt(shared, ranks.rank, ranks.world_size)}", shared)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    limit_waiting(PREPARATION_MINUTES)
    try:
        yield
    finally:
        dist.destroy_process_group()


def limit_waiting(minutes: float) -> None:
    """From here on, a rank that does not take part for so long is given up: the others raise."""
    if dist.is_initialized():
        dist.set_timeout(timedelta(minutes=minutes))


LOST = re.compile(r"gloo/transport|(closed|reset) by peer|pair closure|Timed out waiting")  # gloo's words


def lost_contact(error: Exception) -> bool:
    """Another rank ended or hangs: not this one's fault, and its traceback would hide the true cause."""
    if not dist.is_initialized() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or bool(LOST.search(str(error)))


class Agreement:
    """Numbers that every rank contributes to, summed over the ranks, one call later.

    The sum that a call returns was begun by the call before, and has been under way meanwhile: nobody
    waits, and no device is synchronised. Every rank must make the same calls.
    """

    def __init__(self, ranks: Ranks):
        self.world_size = ranks.world_size
        self.pending: tuple[Any, Tensor] | None = None

    def exchange(self, *mine: int) -> list[int]:
        """Sums of what was given to the previous call, or zeros; a single process gets its own at once."""
        if self.world_size == 1:
            return list(mine)
        agreed = self.settle() or [0] * len(mine)
        numbers = torch.tensor(mine, dtype=torch.int64)
        self.pending = (dist.all_reduce(numbers, async_op=True), numbers)
        return agreed

    def settle(self) -> list[int]:
        """End what is under way, and return its sums; empty if there is nothing."""
        if self.pending is None:
            return []
        work, numbers = self.pending
        self.pending = None
        work.wait()
        result: list[int] = numbers.tolist()
        return result


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

    While training, each rank gathers batch-norm statistics of its own, which no gradient depends on; rank
    0's are evaluated and saved. A model that finds its subject looks with them while training too: then
    they are broadcast before each forward pass.
    """
    if ranks.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        forward_sync_buffers=getattr(model, "subject", None) is not None,
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


def gather_list(values: list[T], ranks: Ranks) -> list[list[T]]:
    """Plain values of each rank, in the order of ranks, for every rank."""
    if ranks.world_size == 1:
        return [values]
    parts: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(parts, values)
    return parts


def gather_rows(rows: Tensor, ranks: Ranks) -> Tensor | None:
    """CPU tensors [n_rank, ...] of any n_rank -> their concatenation on rank 0, None on the others."""
    if ranks.world_size == 1:
        return rows
    parts: list[Any] | None = [None] * ranks.world_size if ranks.is_main else None
    dist.gather_object(rows.numpy(), parts, dst=0)
    return torch.cat([torch.from_numpy(part) for part in parts]) if parts else None

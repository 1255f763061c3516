"""Ranks, process groups and what is exchanged in them."""

import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from serve.contract.errors import UserError
from serve.contract.urls import redact
from train.rendezvous import agree_on_attempt
from train.signals import Preempted

T = TypeVar("T")
Log = Callable[[str], None]  # takes one line for the user
TIMEOUT = timedelta(minutes=30)  # for all ranks to join
PREPARATION_MINUTES = 24 * 60.0  # rank 0 reads, copies and decodes a data set while the others wait


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True in one process of the whole job."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """Return torchrun's ranks; without torchrun there is one process.

    With --virtual-local-rank torchrun gives every process one GPU and the local rank 0: then a process's
    place on its machine follows from its rank, as machines have equally many processes, numbered in a row.
    """
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    ranks = Ranks(*(int(os.environ.get(name, default)) for name, default in defaults.items()))
    machines, machine = (int(os.environ.get(name, 0)) for name in ("GROUP_WORLD_SIZE", "GROUP_RANK"))
    place = ranks.rank - machine * ranks.local_world_size
    one_gpu = re.fullmatch(r"[^,]+", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if one_gpu and ranks.local_rank == 0 and ranks.world_size == machines * ranks.local_world_size:
        return replace(ranks, local_rank=place)
    return ranks


def main_log(ranks: Ranks) -> Log:
    """Return a function that prints a line on rank 0, without passwords in URLs, and nothing elsewhere."""
    return (lambda line: print(redact(line), flush=True)) if ranks.is_main else lambda line: None


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Join the ranks for as long as the context lasts: by nccl on CUDA, with gloo for CPU tensors, and by
    gloo elsewhere. A single process needs no group.

    After an error the group is left as it is: nccl's end waits for all ranks, and the one with the error
    would hang before it has printed it. `shutdown.leave` ends such a process.
    """
    if ranks.world_size == 1:
        yield
        return
    shared, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    store = PrefixStore(f"purebred/{agree_on_attempt(shared, ranks.rank, ranks.world_size)}", shared)
    check_own_gpus(store, ranks, device)
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
    except Preempted:  # on all ranks
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def may_share_gpus() -> bool:
    """Return whether nccl (2.30 or newer) was set to let several ranks have one GPU."""
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"


def check_own_gpus(store: Store, ranks: Ranks, device: torch.device) -> None:
    """Check that no two ranks have the same GPU, before nccl fails with less to read. Every rank calls it.

    Raises:
        UserError: on all ranks.
    """
    if device.type != "cuda" or may_share_gpus():
        return
    store.set(f"gpu/{ranks.rank}", gpu_identity(device))
    found = store.multi_get([f"gpu/{rank}" for rank in range(ranks.world_size)])
    for rank, gpu in enumerate(found):
        if (first := found.index(gpu)) < rank:
            raise UserError(
                f"ranks {first} and {rank} have the same GPU ({gpu.decode()}): start as many processes as "
                "there are GPUs (lower --nproc_per_node), let each see one of its own (torchrun's "
                "--virtual-local-rank, Slurm's --gpus-per-task=1), or use --device cpu"
            )


def gpu_identity(device: torch.device) -> str:
    """Return what no other GPU has. Slices of one (MIG) may have its UUID: they also differ by the variable
    that chooses them, or by their container."""
    properties = torch.cuda.get_device_properties(device)
    slices = [os.environ.get("CUDA_VISIBLE_DEVICES", ""), socket.gethostname()]
    return " ".join([str(properties.uuid), *(slices if "MIG" in properties.name else [])])


def limit_waiting(minutes: float) -> None:
    """Let every later exchange raise an error when a rank does not take part for so long."""
    if dist.is_initialized():
        dist.set_timeout(timedelta(minutes=minutes))


GLOO_LOST = re.compile(r"gloo/transport|(closed|reset) by peer|pair closure|Timed out waiting")


def lost_contact(error: Exception) -> bool:
    """Return whether an error means that another rank has ended or hangs, and is no bug of this one."""
    if not dist.is_initialized() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or bool(GLOO_LOST.search(str(error)))


class AsyncSum:
    """Sums of integers over the ranks, each available one call later, so that no rank or device waits.

    Every rank must make the same calls.
    """

    def __init__(self, ranks: Ranks):
        self.world_size = ranks.world_size
        self.pending: tuple[Any, Tensor] | None = None

    def exchange(self, *mine: int) -> list[int]:
        """Return the sums of the previous call, zeros in the first; a single process gets its own now."""
        if self.world_size == 1:
            return list(mine)
        sums = self.finish() or [0] * len(mine)
        numbers = torch.tensor(mine, dtype=torch.int64)
        self.pending = (dist.all_reduce(numbers, async_op=True), numbers)
        return sums

    def finish(self) -> list[int]:
        """Wait for the last call's sums and return them; empty if they were returned before."""
        if self.pending is None:
            return []
        work, numbers = self.pending
        self.pending = None
        work.wait()
        result: list[int] = numbers.tolist()
        return result


def on_main(ranks: Ranks, function: Callable[[], T]) -> T:
    """Run `function` on rank 0 alone; every rank returns its result, or raises its error."""
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
    """Return the model in DistributedDataParallel, or the model itself in a single process.

    Each rank gathers batch-norm statistics of its own in an epoch, which no gradient depends on; at its end
    they are averaged. A model that finds its subject uses them in training too: then rank 0's are broadcast
    before each forward pass.
    """
    if ranks.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        batched_grad_copy=device.type == "cuda",  # one launch for a bucket in place of one a parameter
        forward_sync_buffers=getattr(model, "subject", None) is not None,
    )


def gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Keep the gradients of this backward pass local unless `enabled` (gradient accumulation)."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place; return it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the mean of a tensor over the ranks. In float64, float32 numbers that are equal on all ranks
    keep their bits, as their sum is exact."""
    return sum_over_ranks(values) / dist.get_world_size() if dist.is_initialized() else values


def max_over_ranks(value: float) -> float:
    """Return the largest of the ranks' values."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def gather_list(values: list[T], ranks: Ranks) -> list[list[T]]:
    """Return the lists of all ranks in the order of ranks, on every rank; values must be picklable."""
    if ranks.world_size == 1:
        return [values]
    parts: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(parts, values)
    return parts


def gather_parts(mine: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return the tensors [sizes[rank]] of all ranks, on every rank and on their device."""
    padded = torch.nn.functional.pad(mine, (0, max(sizes) - len(mine)))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def gather_rows(rows: Tensor, ranks: Ranks) -> Tensor | None:
    """Return the CPU tensors [n_rank, ...] of all ranks concatenated, on rank 0; None on the others."""
    if ranks.world_size == 1:
        return rows
    parts: list[Any] | None = [None] * ranks.world_size if ranks.is_main else None
    dist.gather_object(rows.numpy(), parts, dst=0)
    return torch.cat([torch.from_numpy(part) for part in parts]) if parts else None

"""Processes act as one: errors, results and sums reach all, and a lost peer is no bug."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import on_ranks

from serve.contract.errors import UserError
from train.distributed import (
    AsyncSum,
    Ranks,
    check_own_gpus,
    gather_list,
    gather_rows,
    gpu_identity,
    gradient_sync,
    lost_contact,
    max_over_ranks,
    mean_over_ranks,
    on_main,
    process_group,
    ranks_from_environment,
    sum_over_ranks,
    wrap,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WORLD = 3


def test_without_torchrun_it_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_from_environment() == Ranks()
    with process_group(Ranks(), CPU):
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("rank", "local", "machine", "machines", "size", "visible", "expected"),
    [
        (5, 0, 1, 2, 4, "1", 1),  # torchrun --virtual-local-rank
        (4, 0, 1, 2, 4, "0", 0),
        (3, 0, 0, 1, 4, "MIG-1-2-3", 3),
        (3, 3, 0, 1, 4, "0,1,2,3", 3),
        (5, 1, 1, 2, 4, "0", 1),  # one GPU each without torchrun's help
        (4, 0, 1, 2, 3, "0", 0),  # machines of different sizes
    ],
)
def test_the_place_on_a_machine_is_found_where_each_process_is_given_local_rank_0(
    rank: int,
    local: int,
    machine: int,
    machines: int,
    size: int,
    visible: str,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = 7 if size == 3 else machines * size
    values = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": size}
    values |= {"GROUP_RANK": machine, "GROUP_WORLD_SIZE": machines}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert ranks_from_environment() == Ranks(rank, expected, world, size)


def gpus(monkeypatch: pytest.MonkeyPatch, *found: tuple[str, str, str]) -> None:
    """Check the GPUs of ranks, each with a UUID, a name and what is visible to the rank."""
    store = dist.HashStore()
    for rank in reversed(range(len(found))):
        uuid, name, visible = found[rank]
        properties = SimpleNamespace(uuid=uuid, name=name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        if rank:
            store.set(f"gpu/{rank}", gpu_identity(CUDA))
    check_own_gpus(store, Ranks(0, 0, len(found), len(found)), CUDA)


def test_ranks_that_share_a_gpu_are_found_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    gpus(monkeypatch, ("a", "H200", "0"), ("b", "H200", "0"), ("c", "H200", "1"))
    shared = (("a", "H200", "0"), ("b", "H200", "0"), ("b", "H200", "0"))
    with pytest.raises(UserError, match=r"\b1 and 2\b.*\bb\b.*--nproc_per_node.*--device cpu"):
        gpus(monkeypatch, *shared)
    check_own_gpus(dist.HashStore(), Ranks(0, 0, 3, 3), CPU)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    gpus(monkeypatch, *shared)


def test_slices_of_one_gpu_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    name = "H200 MIG 1g.18gb"
    gpus(monkeypatch, ("a", name, "MIG-1"), ("a", name, "MIG-2"))
    with pytest.raises(UserError, match=r"\b0 and 1\b"):
        gpus(monkeypatch, ("a", name, "MIG-1"), ("a", name, "MIG-1"))


def test_one_process_needs_no_group() -> None:
    rows = torch.arange(3)
    assert on_main(Ranks(), lambda: 7) == 7
    assert gather_rows(rows, Ranks()) is rows
    assert gather_list([1], Ranks()) == [[1]]
    assert max_over_ranks(2.5) == 2.5
    assert AsyncSum(Ranks()).exchange(3, 4) == [3, 4]
    model = torch.nn.Linear(1, 1)
    assert wrap(model, Ranks(), CPU) is model


def test_an_error_of_this_process_is_no_lost_contact() -> None:
    assert not lost_contact(RuntimeError("Connection closed by peer"))  # there is no group


def exchanges(ranks: Ranks) -> dict[str, Any]:
    def fails() -> None:
        raise ValueError("no such folder")

    try:
        on_main(ranks, fails)
        message = ""
    except ValueError as error:
        message = str(error)
    async_sum = AsyncSum(ranks)
    rows = gather_rows(torch.full((ranks.rank, 2), ranks.rank), ranks)  # none of rank 0, two of rank 2
    return {
        "error": message,
        "result": on_main(ranks, os.getpid) == on_main(ranks, os.getpid),
        "agreed": [async_sum.exchange(1, ranks.rank), async_sum.exchange(5, 5), async_sum.finish()],
        "nothing left": async_sum.finish(),
        "rows": None if rows is None else rows.tolist(),
        "list": gather_list([ranks.rank] * ranks.rank, ranks),
        "sum": sum_over_ranks(torch.tensor([1.0, ranks.rank])).tolist(),
        "max": max_over_ranks(float(-ranks.rank)),
    }


def test_errors_results_and_sums_reach_every_rank(tmp_path: Path) -> None:
    found = on_ranks(exchanges, WORLD, tmp_path)
    for rank, values in enumerate(found):
        assert values["error"] == "no such folder"
        assert values["result"]
        assert values["agreed"] == [[0, 0], [3, 3], [15, 15]]  # one call later
        assert values["nothing left"] == []
        assert values["rows"] == ([[1, 1], [2, 2], [2, 2]] if rank == 0 else None)
        assert values["list"] == [[], [1], [2, 2]]
        assert values["sum"] == [3.0, 3.0]
        assert values["max"] == 0.0


def accumulated(ranks: Ranks) -> list[float]:
    """Gradients of two micro-batches, of which only the second is reduced."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    wrapped = wrap(model, ranks, CPU)
    for number in range(2):
        with gradient_sync(wrapped, number == 1):
            wrapped(torch.full((1, 1), 10.0 * number + ranks.rank)).sum().backward()
            if number == 0:
                local = model.weight.grad.item()
    return [local, model.weight.grad.item()]


def test_gradients_are_reduced_with_the_last_micro_batch_only(tmp_path: Path) -> None:
    assert on_ranks(accumulated, WORLD, tmp_path) == [[float(rank), 12.0] for rank in range(WORLD)]


def averaged(ranks: Ranks) -> list[torch.Tensor]:
    """Numbers that differ between ranks, and some that do not, which have no exact sum in float32."""
    same = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    different = torch.full((1000,), ranks.rank, dtype=torch.float64)
    return [mean_over_ranks(different), mean_over_ranks(same.double()).float()]


def test_the_mean_of_equal_numbers_keeps_their_bits(tmp_path: Path) -> None:
    numbers = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for mean, same in on_ranks(averaged, WORLD, tmp_path):
        assert mean.tolist() == [1.0] * 1000
        assert torch.equal(same, numbers)


def contact(ranks: Ranks) -> list[bool]:
    """Rank 2 goes without a word; a bug of a rank's own is none of that."""
    bug = lost_contact(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    if ranks.rank == 2:
        return [bug, True]
    try:
        sum_over_ranks(torch.zeros(1))
    except RuntimeError as error:
        return [bug, lost_contact(error)]
    return [bug, False]


def test_a_lost_peer_is_distinguished_from_a_bug(tmp_path: Path) -> None:
    assert on_ranks(contact, WORLD, tmp_path) == [[False, True]] * WORLD


def test_no_other_module_reads_ranks() -> None:
    root = Path(__file__).resolve().parents[2]
    readers = {
        path.name
        for path in (root / "train").rglob("*.py")
        if any(name in path.read_text() for name in ('"RANK"', '"WORLD_SIZE"', '"LOCAL_RANK"'))
    }
    assert readers == {"distributed.py"}

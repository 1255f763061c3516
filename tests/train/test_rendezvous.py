"""Ranks of one attempt find each other, and nobody who is dead."""

import threading
import time

import pytest

from train.rendezvous import agree_on_attempt


class Memory:
    """A store that several threads share, as torchrun's outlives its workers."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


def meet(store: Memory, world_size: int, order: list[int], pause: float = 0.0) -> list[str]:
    """Names that the ranks agree on, started in this order."""
    names = [""] * world_size

    def join(rank: int) -> None:
        names[rank] = agree_on_attempt(store, rank, world_size, seconds=20)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
        time.sleep(pause)
    for thread in threads:
        thread.join()
    return names


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_all_ranks_agree_whoever_comes_first(order: list[int]) -> None:
    names = meet(Memory(), 3, order, 0.05)
    assert len(set(names)) == 1
    assert names[0]


def test_each_attempt_on_one_store_has_a_name_of_its_own() -> None:
    store = Memory()
    attempts = [meet(store, 3, [1, 2, 0]) for _ in range(4)]
    assert all(len(set(names)) == 1 for names in attempts)
    assert len({names[0] for names in attempts}) == 4


def test_a_rank_that_died_while_it_waited_is_replaced() -> None:
    store = Memory()
    with pytest.raises(TimeoutError, match="rank 0"):
        agree_on_attempt(store, 1, 3, seconds=0.1)  # leaves its name behind
    with pytest.raises(TimeoutError, match=r"\[1, 2\]"):
        agree_on_attempt(store, 0, 3, seconds=0.1)  # answered the dead
    names = meet(store, 3, [0, 2, 1], 0.1)
    assert len(set(names)) == 1


def test_a_rank_0_that_died_after_it_answered_is_replaced() -> None:
    """Rank 1 has confirmed to a rank 0 that is no more: it follows the new one."""
    store, names = Memory(), ["", ""]

    def join(rank: int) -> None:
        names[rank] = agree_on_attempt(store, rank, 2, seconds=20)

    waiting = threading.Thread(target=join, args=(1,))
    waiting.start()
    while "purebred/2/joined/1" not in store.values:
        time.sleep(0.01)
    name = store.get("purebred/2/joined/1").decode()
    store.set(f"purebred/2/answer/{name}", "dead")
    while f"purebred/2/dead/{name}" not in store.values:
        time.sleep(0.01)
    join(0)
    waiting.join()
    assert names[0] == names[1] != "dead"

"""Which processes belong together, when torchrun has restarted some of them.

torchrun's store lives as long as its agent, and keeps what the processes of earlier attempts wrote: their
addresses (pytorch/pytorch#135712). Those of a new attempt must not read them. The restart count would not
do as a name: across nodes, each agent counts its own.
"""

import time
import uuid
from typing import Protocol

POLL_SECONDS = 0.02
WAIT_SECONDS = 900.0  # for ranks that are still to be started, on whatever node


class Store(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


def agree_on_attempt(store: Store, rank: int, world_size: int, seconds: float = WAIT_SECONDS) -> str:
    """A name that exactly the living processes of this attempt share.

    Each rank announces itself under a name that was never used before. Rank 0 answers whoever is the latest
    under each rank, and goes when all of those have confirmed: what dead processes left is overwritten or
    never confirmed.

    Raises:
        TimeoutError: some rank did not come; the message names it.
    """
    me, place = uuid.uuid4().hex, f"purebred/{world_size}"
    deadline = time.monotonic() + seconds
    if rank == 0:
        answered: dict[int, str] = {}
        while True:
            for other in range(1, world_size):
                name = _read(store, f"{place}/here/{other}")
                if name and answered.get(other) != name:
                    store.set(f"{place}/answer/{name}", me)
                    answered[other] = name
            missing = [
                other
                for other in range(1, world_size)
                if other not in answered or not store.check([f"{place}/{me}/{answered[other]}"])
            ]
            if not missing:
                store.set(f"{place}/{me}/go", "1")
                return me
            _wait(deadline, f"ranks {missing} did not join")
    store.set(f"{place}/here/{rank}", me)
    attempt = ""
    while True:
        answer = _read(store, f"{place}/answer/{me}")  # a rank 0 that was restarted meanwhile answers anew
        if answer and answer != attempt:
            attempt = answer
            store.set(f"{place}/{attempt}/{me}", "1")
        if attempt and store.check([f"{place}/{attempt}/go"]):
            return attempt
        _wait(deadline, "rank 0 did not answer")


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{what} in time; see the output of the other ranks and nodes")
    time.sleep(POLL_SECONDS)

"""Rendezvous of one attempt's ranks, where torchrun's store still holds the addresses of earlier attempts.

torchrun's agent keeps one store for all restarts of its processes (pytorch/pytorch#135712). The restart
count cannot tell the attempts apart: across nodes, each agent counts its own. This module can go when torch
gives every attempt a store or a prefix of its own; `_create_c10d_store` of torch 2.14 does not.
"""

import time
import uuid

from torch.distributed.distributed_c10d import Store

POLL_SECONDS = 0.02
WAIT_SECONDS = 900.0  # for ranks that are still to be started, on any node


def agree_on_attempt(store: Store, rank: int, world_size: int, seconds: float = WAIT_SECONDS) -> str:
    """Return a name that exactly the living processes of this attempt share.

    Each rank announces itself by a new name. Rank 0 answers the latest name of each rank, and ends the wait
    when all of those have confirmed: names of dead processes are overwritten, or never confirmed.

    Raises:
        TimeoutError: a rank did not join; the message names it.
    """
    me, prefix = uuid.uuid4().hex, f"purebred/{world_size}"
    deadline = time.monotonic() + seconds
    if rank == 0:
        answered: dict[int, str] = {}
        others = range(1, world_size)
        while True:
            for other in others:
                name = _read(store, f"{prefix}/joined/{other}")
                if name and answered.get(other) != name:
                    store.set(f"{prefix}/answer/{name}", me)
                    answered[other] = name
            missing = [
                other
                for other in others
                if other not in answered or not store.check([f"{prefix}/{me}/{answered[other]}"])
            ]
            if not missing:
                store.set(f"{prefix}/{me}/complete", "1")
                return me
            _wait(deadline, f"ranks {missing} did not join")
    store.set(f"{prefix}/joined/{rank}", me)
    attempt = ""
    while True:
        answer = _read(store, f"{prefix}/answer/{me}")  # a restarted rank 0 answers anew
        if answer and answer != attempt:
            attempt = answer
            store.set(f"{prefix}/{attempt}/{me}", "1")
        if attempt and store.check([f"{prefix}/{attempt}/complete"]):
            return attempt
        _wait(deadline, "rank 0 did not answer")


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{what} in time; see the output of the other ranks and nodes")
    time.sleep(POLL_SECONDS)

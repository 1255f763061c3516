"""Spread small work over the threads that torch has been given."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def in_threads(function: Callable[..., Result], *columns: Iterable[Any]) -> list[Result]:
    """list(map(function, *columns)) by as many threads as torch computes with, for functions that hold the
    interpreter's lock for little of their time: decoding, not crops of 0.1 ms. Loader processes have one
    thread and need none.

    Raises:
        Exception: what `function` raised first, in the columns' order.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return list(map(function, *columns))
    return list(_pool(threads).map(function, *columns))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="pixels")

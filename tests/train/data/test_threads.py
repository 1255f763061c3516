"""Work spread over torch's threads comes back in order, with its errors."""

import threading
from collections.abc import Iterator

import pytest
import torch

from train.data.threads import in_threads


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_are_in_the_order_of_the_columns(threads: int) -> None:
    assert in_threads(lambda a, b: a - b, range(100), [1] * 100) == list(range(-1, 99))


def test_as_many_work_at_once_as_torch_has_threads(threads: int) -> None:
    meeting = threading.Barrier(threads, timeout=30)  # broken, and an error, if fewer come

    assert len(in_threads(lambda _: meeting.wait(), range(threads))) == threads


def test_an_error_arrives(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda x: 1 // x, [1, 0, 2])

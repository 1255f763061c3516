"""The index of a data set is held once on a machine, and is the same as the lists that it replaces."""

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from forked import on_ranks
from hypothesis import given
from hypothesis import strategies as st

from train.distributed import Ranks, gather_list
from train.shared_memory import Texts, share

names = st.binary(max_size=12).map(lambda name: name.decode("utf-8", "surrogateescape"))


@given(st.lists(names, max_size=8))
def test_texts_are_the_list_that_they_were_made_of(texts: list[str]) -> None:
    packed = Texts.of(texts)
    assert list(packed) == texts
    assert list(pickle.loads(pickle.dumps(packed))) == texts


@pytest.mark.parametrize("index", [2, -1])
def test_an_index_outside_is_an_error(index: int) -> None:
    with pytest.raises(IndexError):
        Texts.of(["a", "b"])[index]


def test_a_single_process_keeps_its_arrays_and_writes_nothing(tmp_path: Path) -> None:
    array = np.arange(3)
    assert share([array], Ranks(), tmp_path / "cache")[0] is array
    assert not (tmp_path / "cache").exists()


SIZE = 50_000_000


def memory_of_a_copy(folder: str, ranks: Ranks) -> tuple[float, float]:
    """Return this process's own memory as a share of an array: with a copy of it, and once it is shared."""

    def own() -> int:
        uss: int = psutil.Process().memory_full_info().uss
        return uss

    share([np.ones(9)], ranks, Path(folder))
    before = own()
    arrays = [np.full(SIZE, 7, np.uint8), np.zeros((0, 2))]
    kept = own()
    arrays = share(arrays, ranks, Path(folder))
    assert arrays[0].sum(dtype=np.int64) == 7 * SIZE
    assert arrays[1].shape == (0, 2)
    gather_list([True], ranks)  # a page is shared once the other process has read it too
    found = (kept - before) / SIZE, (own() - before) / SIZE
    gather_list([True], ranks)  # and while it lives
    return found


@pytest.mark.parametrize("full", [False, True], ids=["room on the disk", "no room"])
def test_processes_share_one_copy_where_there_is_room(tmp_path: Path, full: bool) -> None:
    folder = tmp_path / "cache"
    if full:
        folder.write_text("not a folder: nothing can be written")
    for kept, shared in on_ranks(partial(memory_of_a_copy, str(folder)), 2, tmp_path):
        assert kept > 0.9
        assert (shared > 0.9) if full else (shared < 0.1)
    assert ("warning" in (tmp_path / "log").read_text()) == full
    if not full:
        assert list(folder.iterdir()) == [], "nothing is left behind"

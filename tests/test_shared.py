"""The index of a data set is held once on a machine, and is the same as the lists that it replaces."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.distributed import Ranks
from train.shared import Texts, share

ROOT = Path(__file__).resolve().parents[1]

names = st.binary(max_size=12).map(lambda name: name.decode("utf-8", "surrogateescape"))


@given(st.lists(names, max_size=8), st.slices(8))
def test_texts_are_the_list_that_they_were_made_of(texts: list[str], part: slice) -> None:
    packed = Texts.of(texts)
    assert list(packed) == texts
    assert packed == texts
    assert texts == packed
    assert packed != [*texts, "one more"]
    assert packed[part] == texts[part]
    assert [packed[i - len(texts)] for i in range(len(texts))] == texts
    assert list(pickle.loads(pickle.dumps(packed))) == texts


@pytest.mark.parametrize("index", [2, -3])
def test_a_place_outside_is_an_error(index: int) -> None:
    with pytest.raises(IndexError):
        Texts.of(["a", "b"])[index]


def test_a_single_process_keeps_its_arrays_and_writes_nothing(tmp_path: Path) -> None:
    array = np.arange(3)
    assert share([array], Ranks(), tmp_path / "cache")[0] is array
    assert not (tmp_path / "cache").exists()


SCRIPT = r"""
import json, os, sys
from pathlib import Path

import numpy as np
import psutil
import torch

from train.distributed import gather_list, process_group, ranks_from_environment
from train.shared import share

SIZE = 50_000_000
ranks = ranks_from_environment()
own = lambda: psutil.Process().memory_full_info().uss
with process_group(ranks, torch.device("cpu")):
    share([np.ones(9)], ranks, Path(sys.argv[1]))
    before = own()
    arrays = [np.full(SIZE, 7, np.uint8), np.zeros((0, 2))]
    kept = own()
    arrays = share(arrays, ranks, Path(sys.argv[1]))
    assert arrays[0].sum(dtype=np.int64) == 7 * SIZE and arrays[1].shape == (0, 2)
    gather_list([True], ranks)  # a page is shared once the other process has read it too
    found = (kept - before) / SIZE, (own() - before) / SIZE
    gather_list([True], ranks)  # and while it lives
    os.write(1, f"{json.dumps(found)}\n".encode())  # whole lines: both write to one pipe
"""


@pytest.mark.parametrize("full", [False, True], ids=["room on the disk", "no room"])
def test_processes_share_one_copy_where_there_is_room(tmp_path: Path, full: bool) -> None:
    (tmp_path / "main.py").write_text(SCRIPT)
    folder = tmp_path / "cache"
    if full:
        folder.write_text("not a folder: nothing can be written")
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "main.py"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 2
    for kept, shared in map(json.loads, lines):
        assert kept > 0.9
        assert (shared > 0.9) if full else (shared < 0.1)
    assert ("each process keeps its own list" in done.stdout) == full
    if not full:
        assert list(folder.iterdir()) == [], "nothing is left behind"

"""Memory of a session: it is there when it is needed, and given back when it no longer is."""

import mmap
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from serve import heap

ROOT = Path(__file__).resolve().parents[2]
LAYERS, WIDTH = 6, 512
GLIBC = platform.libc_ver()[0] == "glibc"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
KERNEL = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))

CHILD = """
import resource, sys
from contextlib import nullcontext
sys.path.insert(0, sys.argv[1])
from serve.heap import reused_heap, warm_up
if sys.argv[3] == "warm":
    warm_up(["main.py", "--model", sys.argv[2]])
import onnxruntime as ort

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = resident()
with nullcontext() if sys.argv[3] == "plain" else reused_heap():
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    session = ort.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
print(resident() - before, faults)
"""


def write_convolutions(path: Path) -> int:
    """A chain of 3x3 convolutions; returns the bytes of their weights."""
    weights = np.random.default_rng(0).standard_normal((WIDTH, WIDTH, 3, 3)).astype(np.float32)
    nodes = [helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(LAYERS)]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["N", WIDTH, 32, 32])],
        [helper.make_tensor_value_info(f"x{LAYERS}", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights + i, f"w{i}") for i in range(LAYERS)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return LAYERS * weights.nbytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    return path, write_convolutions(path)


def kept_and_faults(model: Path, how: str) -> tuple[int, int]:
    """Bytes that a session leaves in memory, and page faults while it is made."""
    command = [sys.executable, "-c", CHILD, str(ROOT), str(model), how]
    kept, faults = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(kept), int(faults)


@pytest.mark.skipif(not GLIBC, reason="needs glibc")
def test_a_session_keeps_little_more_than_its_weights(model: tuple[Path, int]) -> None:
    path, weights = model
    plain, ours = (kept_and_faults(path, how)[0] for how in ("plain", "ours"))
    assert ours < 1.3 * weights < plain


@pytest.mark.skipif(
    not (GLIBC and KERNEL >= (5, 14))
    or "[always]" in (HUGE_PAGES.read_text() if HUGE_PAGES.exists() else ""),
    reason="needs glibc, Linux 5.14 and pages of 4 KiB",
)
def test_memory_that_was_mapped_beforehand_is_used_and_given_back(model: tuple[Path, int]) -> None:
    path, weights = model
    ours, warm = (kept_and_faults(path, how) for how in ("ours", "warm"))
    pages = heap.COPIES * weights // mmap.PAGESIZE
    assert warm[1] < ours[1] - 0.8 * pages
    assert warm[0] < 1.3 * weights


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model"],
        ["--model", "/nonexistent"],
        ["--model=s3://bucket/m.onnx"],
        ["--model", "x\0"],
        ["--model", "/"],
    ],
)
def test_nothing_is_mapped_for_what_is_no_file(arguments: list[str]) -> None:
    heap.warm_up(["main.py", *arguments])
    assert not heap._warming


def test_without_glibc_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(heap.ctypes, "CDLL", None)
    heap.warm_up(["main.py", "--model", __file__])
    with heap.reused_heap():
        pass

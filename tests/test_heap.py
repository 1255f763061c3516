"""Memory of a session: what it no longer needs is given back."""

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from serve import heap

ROOT = Path(__file__).resolve().parents[1]
LAYERS, WIDTH = 10, 512

CHILD = """
import resource, sys
from contextlib import nullcontext
sys.path.insert(0, sys.argv[1])
import onnxruntime as ort
from serve.heap import reused_heap

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = resident()
with reused_heap() if sys.argv[3] == "ours" else nullcontext():
    session = ort.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
print(resident() - before)
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_session_keeps_little_more_than_its_weights(tmp_path: Path) -> None:
    weights = write_convolutions(tmp_path / "model.onnx")

    def kept(how: str) -> int:
        command = [sys.executable, "-c", CHILD, str(ROOT), str(tmp_path / "model.onnx"), how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert kept("ours") < 1.3 * weights < kept("plain")


def test_without_glibc_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(heap.ctypes, "CDLL", None)
    with heap.reused_heap():
        pass

"""What CUDA and OpenVINO are told: the precision asked for, and nothing faster in silence."""

from pathlib import Path

import onnxruntime as ort
import pytest
from serve_model import model_verified_on

from export.gate import FLOAT32, limits_for
from serve.predictor import Predictor
from serve.providers import openvino
from serve.providers.base import Runtime
from serve.providers.cuda import Cuda


@pytest.mark.parametrize(
    ("file", "precision", "tf32", "nhwc"),
    [("fp32", "fp32", "0", None), ("fp32", "tf32", "1", None), ("fp16", "fp32", "1", "1")],
)
def test_tf32_and_the_layout_of_half_precision_are_pairings_of_their_own(
    file: str, precision: str, tf32: str, nhwc: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    providers = Cuda().configure(ort.SessionOptions(), Runtime("cuda", precision, device_id=3), file)
    assert providers is not None
    name, options = providers[0]
    assert (name, providers[1]) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert (options["use_tf32"], options.get("prefer_nhwc"), options["device_id"]) == (tf32, nhwc, "3")
    assert (limits_for(file, precision, 0.3) == FLOAT32) == (file == precision), "rounded answers are gated"


class _Device:
    def __init__(self, capabilities: str):
        self.ep_metadata = {"OPTIMIZATION_CAPABILITIES": capabilities}


@pytest.mark.parametrize(
    ("capabilities", "flags"),
    [("FP32 INT8 BIN", {"avx512_bf16"}), ("BF16 FP32", {"avx2", "avx512f", "avx512_vnni"})],
)
def test_bf16_without_the_processor_for_it_is_an_error_not_fp32_nor_emulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capabilities: str, flags: set[str]
) -> None:
    monkeypatch.setattr(openvino.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(openvino, "openvino_devices", lambda: (_Device(capabilities),))
    monkeypatch.setattr(openvino, "processor_flags", lambda: frozenset(flags))
    with pytest.raises(ValueError, match=r"bf16.*--precision fp32"):
        Predictor(model_verified_on(tmp_path, "openvino:bf16"), "openvino", precision="bf16")

"""Options of CUDA, TensorRT and OpenVINO: the precision asked for, and nothing faster in silence."""

import os
from pathlib import Path

import onnxruntime as ort
import pytest
from serve_model import SIZE, model_verified_on

from export.gate import FLOAT32, limits_for
from serve.contract.metadata import ModelMetadata
from serve.contract.preprocess import Preprocess
from serve.predictor import Predictor
from serve.providers import openvino
from serve.providers.base import Runtime
from serve.providers.cuda import Cuda, cuda_options
from serve.providers.tensorrt import TensorRT


def tensorrt_options(path: Path, runtime: Runtime, metadata: ModelMetadata) -> dict[str, str]:
    providers = TensorRT().configure(ort.SessionOptions(), path, runtime, metadata)
    assert providers is not None
    options: dict[str, str] = providers[0][1]
    return options


def test_cuda_computes_in_float32_where_float32_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    name, options = cuda_options(Runtime("cuda", device_id=3))
    assert name == "CUDAExecutionProvider"
    assert options["use_tf32"] == "0"
    assert options["device_id"] == "3"


@pytest.mark.parametrize(
    ("file", "precision", "tf32", "nhwc"),
    [("fp32", "fp32", "0", None), ("fp32", "tf32", "1", None), ("fp16", "fp32", "1", "1")],
)
def test_tf32_and_the_layout_of_half_precision_are_pairings_of_their_own(
    file: str, precision: str, tf32: str, nhwc: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    metadata = ModelMetadata(("a", "b"), Preprocess(), precision=file)
    providers = Cuda().configure(ort.SessionOptions(), tmp_path, Runtime("cuda", precision), metadata)
    assert providers is not None
    name, options = providers[0]
    assert (name, providers[1]) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert (options["use_tf32"], options.get("prefer_nhwc")) == (tf32, nhwc)
    assert (limits_for(file, precision, 0.3) == FLOAT32) == (file == precision), "rounded answers are gated"


@pytest.mark.parametrize(("precision", "flags"), [("fp32", "00"), ("fp16", "10"), ("bf16", "01")])
def test_tensorrt_gets_its_precision_and_one_range_of_batch_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, flags: str
) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    model = model_verified_on(tmp_path, "cpu:fp32")
    metadata = ModelMetadata(("a", "b"), Preprocess("crop", 224, 256))
    runtime = Runtime("tensorrt", precision, engine_cache=tmp_path / "engines")
    options = tensorrt_options(model, runtime, metadata)
    assert options["trt_fp16_enable"] + options["trt_bf16_enable"] == flags
    assert options["trt_profile_min_shapes"] == "images:1x224x224x3"
    assert Path(options["trt_engine_cache_path"]).is_dir()
    assert (os.environ.get("NVIDIA_TF32_OVERRIDE") == "0") == (precision == "fp32")


def test_a_user_without_a_home_has_to_say_where_engines_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(ValueError, match="--engine-cache"):
        tensorrt_options(tmp_path, Runtime("tensorrt"), ModelMetadata(("a", "b"), Preprocess()))


def test_models_of_the_same_graph_and_other_weights_share_no_tensorrt_engine(tmp_path: Path) -> None:
    folders = set()
    metadata = ModelMetadata(("a", "b"), Preprocess("crop", SIZE, SIZE))
    for name, precision in (("a", "fp32"), ("b", "fp32"), ("a", "fp16")):
        (tmp_path / name).write_text(name)
        runtime = Runtime("tensorrt", precision, engine_cache=tmp_path / "engines")
        folders.add(tensorrt_options(tmp_path / name, runtime, metadata)["trt_engine_cache_path"])
    assert len(folders) == 3


def test_an_engine_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = model_verified_on(tmp_path, "cpu:fp32")
    runtime = Runtime("tensorrt", engine_cache=tmp_path / "file")
    with pytest.raises(ValueError, match=r"--engine-cache.*Not a directory"):
        tensorrt_options(model, runtime, ModelMetadata(("a", "b"), Preprocess()))


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

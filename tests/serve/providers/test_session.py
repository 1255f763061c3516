"""Providers: the one asked for is the one used, verified with this file, or there is a reason why not."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from serve_model import (
    SIZE,
    build_model,
    colour_of,
    model_verified_on,
    openvino_devices,
    probabilities_for,
    record_verification,
)

from serve.contract.metadata import ModelMetadata, Pairing
from serve.contract.preprocess import Preprocess
from serve.predictor import Predictor
from serve.providers import cuda, openvino, session
from serve.providers.base import Runtime
from serve.providers.registry import PRECISIONS, PROVIDERS
from serve.providers.session import open_session
from serve.verification import read_metadata

needs_gpu_build = pytest.mark.skipif(
    PROVIDERS["cuda"].full_name not in ort.get_available_providers(),
    reason="this onnxruntime is no GPU build",
)
no_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA driver")


# -- what was never verified is not served ----------------------------------------------------------------


def test_a_pairing_never_verified_is_refused_and_the_message_says_how_to_verify(tmp_path: Path) -> None:
    model = model_verified_on(tmp_path, "cuda:fp32", "openvino:bf16")
    with pytest.raises(ValueError, match=r"cuda:fp32, openvino:bf16.*cpu:fp32") as error:
        Predictor(model, "cpu")
    assert "export/main.py --run RUN --verify-provider cpu:fp32" in str(error.value)
    assert "--allow-unverified" in str(error.value)
    with pytest.raises(ValueError, match="cpu:fp32"):
        Predictor(model, "auto")
    assert Predictor(model, "cpu", threads=1, allow_unverified=True).provider == "cpu"
    with pytest.raises(ValueError, match="cpu:fp32"):
        Predictor(model_verified_on(tmp_path), "cpu")


def test_the_way_out_names_the_precision_of_the_file(tmp_path: Path) -> None:
    metadata = ModelMetadata(("a", "b", "c"), Preprocess("crop", SIZE, SIZE), precision="int8")
    model = build_model(tmp_path / "model.int8.onnx", ("a", "b", "c"), metadata=metadata.to_json())
    with pytest.raises(ValueError, match="--model-precision int8 --verify-provider cpu:fp32"):
        Predictor(model, "cpu")


# -- auto -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reports", "precision", "chosen"),
    [
        ([("openvino:fp32", True, 1.3)], "fp32", "openvino"),
        ([("openvino:fp32", True, 0.7)], "fp32", "cpu"),
        ([("openvino:fp32", True, 1.01)], "fp32", "cpu"),  # the noise of a timing
        ([("openvino:fp32", True, 0.0)], "fp32", "cpu"),  # never timed
        ([("openvino:fp32", False, 0.0)], "fp32", "cpu"),
        ([("openvino:fp32", True, 1.3), ("cuda:fp32", True, 9.0)], "fp32", "cuda"),
        ([("openvino:fp32", True, 9.0), ("cuda:fp32", True, 1.3)], "fp32", "openvino"),
        ([("cuda:fp32", True, 0.5)], "fp32", "cpu"),
        ([("openvino:bf16", True, 6.0)], "fp32", "cpu"),  # the precision is the caller's choice
        ([("openvino:bf16", True, 0.5)], "bf16", "openvino"),  # and then there is no other
    ],
    ids=str,
)
def test_auto_takes_the_verified_provider_that_was_clearly_faster(
    tmp_path: Path,
    reports: list[tuple[str, bool, float]],
    precision: str,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_verified_on(tmp_path, "cpu:fp32")
    record_verification(model, *reports)
    monkeypatch.setattr(session, "why_absent", lambda provider: "")
    monkeypatch.setattr(session, "_open", lambda *arguments: arguments[1])
    assert open_session(model, Runtime(precision=precision), read_metadata(model)) == chosen


def test_auto_falls_back_from_the_fastest_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_verified_on(tmp_path, "cpu:fp32")
    record_verification(model, ("cuda:fp32", True, 9.0), ("openvino:fp32", True, 1.3))

    def opens(_: Path, provider: str, *others: object) -> str:
        if provider == "cuda":
            raise ValueError("out of memory")
        return f"{provider} ({others[-1]})"

    monkeypatch.setattr(session, "why_absent", lambda provider: "")
    monkeypatch.setattr(session, "_open", opens)
    opened = str(open_session(model, Runtime(), read_metadata(model)))
    assert opened.startswith("openvino (cuda: out of memory; openvino: 1.30 ")


def test_a_provider_that_opens_a_model_and_cannot_run_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU without room, or without kernels for its kind; here, the CPU in its stead."""

    def fail(*_: object) -> None:
        raise RuntimeError("no kernel image is available")

    model = model_verified_on(tmp_path, "cpu:fp32")
    monkeypatch.setattr(session, "DEFAULT", "another")
    assert open_session(model, Runtime("cpu"), read_metadata(model)).provider == "cpu"
    monkeypatch.setattr(ort.InferenceSession, "run", fail)
    with pytest.raises(ValueError, match=r"'cpu'.*no kernel image"):
        open_session(model, Runtime("cpu"), read_metadata(model))


def test_auto_names_a_faster_precision_that_was_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_verified_on(tmp_path, "cpu:fp32")
    record_verification(model, ("openvino:bf16", True, 6.0))
    monkeypatch.setattr(session, "why_absent", lambda p: "no driver" if p == "cuda" else "")
    predictor = Predictor(model, "auto", threads=1)
    assert predictor.provider == "cpu"
    assert "openvino with --precision bf16: 6.00 " in predictor.reason


@pytest.mark.parametrize(("workers", "threads"), [(1, 8), (2, 4), (3, 2), (8, 1), (16, 1)])
def test_calls_of_the_cpu_provider_share_the_processors(
    tmp_path: Path, workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "available_processors", lambda: 8)
    model = model_verified_on(tmp_path, "cpu:fp32")
    for provider in ("cpu", "auto"):
        for given in (0, 8):
            opened = Predictor(model, provider, given, workers=workers).session
            assert opened.get_session_options().intra_op_num_threads == threads


@pytest.mark.parametrize(("given", "threads"), [(0, 1), (3, 3)])
def test_a_gpu_takes_one_thread_of_the_host_unless_more_are_given(
    given: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(path: Path, options: ort.SessionOptions, providers: list[Any]) -> None:
        raise ValueError(f"{options.intra_op_num_threads} threads")

    monkeypatch.setattr(session, "available_processors", lambda: 8)
    monkeypatch.setattr(session, "why_absent", lambda provider: "")
    monkeypatch.setattr(session, "_create", create)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    with pytest.raises(ValueError, match=f"^{threads} threads"):
        Predictor(model_verified_on(tmp_path, "cpu:fp32"), "cuda", given, allow_unverified=True)


# -- a model is one file ----------------------------------------------------------------------------------


def test_a_model_that_names_a_file_beside_it_as_its_weights_is_refused(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model.onnx")
    onnx.save(onnx.load(model), model, save_as_external_data=True, location="another.bin", size_threshold=0)
    assert ort.InferenceSession(model, providers=["CPUExecutionProvider"]).get_inputs(), "it would load"
    with pytest.raises(ValueError, match=r"model\.onnx: .*[Ee]xternal.* one file"):
        Predictor(model, "cpu")


# -- the precision that is named is used ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "precision", "reason"),
    [
        ("cpu", "bf16", "cpu .*bf16.*--precision fp32.*--provider"),
        ("cuda", "bf16", "cuda .*bf16"),
        ("openvino", "fp16", "openvino .*fp16.*--precision fp32 or bf16"),
        ("cpu", "fp8", "--precision 'fp8'.*fp32, tf32, fp16, bf16"),
        ("tpu", "fp32", "--provider 'tpu'.*auto, cpu, cuda, tensorrt, openvino"),
    ],
)
def test_a_precision_that_a_provider_has_not_is_an_error(
    tmp_path: Path, provider: str, precision: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Predictor(model_verified_on(tmp_path, "cpu:fp32"), provider, precision=precision)


@no_gpu
def test_auto_at_a_precision_that_only_absent_providers_have_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"cpu .*bf16.*openvino: "):
        Predictor(model_verified_on(tmp_path, "cpu:fp32", "openvino:bf16"), "auto", precision="bf16")


# -- a provider that is not there -------------------------------------------------------------------------


def test_openvino_not_installed_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino.importlib.util, "find_spec", lambda _: None)
    model = model_verified_on(tmp_path, "cpu:fp32", "openvino:fp32")
    with pytest.raises(ValueError, match="pip install onnxruntime-ep-openvino"):
        Predictor(model, "openvino")
    predictor = Predictor(model, "auto", threads=1)
    assert predictor.provider == "cpu"
    assert "openvino: " in predictor.reason


def test_openvino_that_takes_no_processor_of_this_machine_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(openvino, "openvino_devices", lambda: ())
    model = model_verified_on(tmp_path, "cpu:fp32", "openvino:fp32")
    with pytest.raises(ValueError, match="OpenVINO"):
        Predictor(model, "openvino")
    record_verification(model, ("openvino:fp32", True, 1.3))
    predictor = Predictor(model, "auto", threads=1)
    assert predictor.provider == "cpu"
    assert "OpenVINO" in predictor.reason


@no_gpu
@needs_gpu_build
@pytest.mark.parametrize(
    ("provider", "reason"),
    [("cuda", "CPUExecutionProvider.*NVIDIA GPU"), ("tensorrt", "pip install tensorrt")],
)
def test_the_silent_fallback_of_onnxruntime_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str, reason: str
) -> None:
    """A driver without the libraries: onnxruntime lists the provider and makes a session of the CPU's."""
    monkeypatch.setattr(cuda, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = model_verified_on(tmp_path, "cpu:fp32", f"{provider}:fp32")
    with pytest.raises(ValueError, match=reason):
        Predictor(model, provider)
    record_verification(model, (f"{provider}:fp32", True, 9.0))
    predictor = Predictor(model, "auto", threads=1)
    assert predictor.provider == "cpu"
    assert ("CPUExecutionProvider" in predictor.reason) == (provider == "cuda")


def test_a_session_that_gives_the_provider_no_node_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be registered and yet run nothing."""
    monkeypatch.setattr(ort.InferenceSession, "get_provider_graph_assignment_info", lambda self: [])
    with pytest.raises(ValueError, match=r"'cpu'.*nodes"):
        Predictor(model_verified_on(tmp_path, "cpu:fp32"), "cpu")


def test_how_many_nodes_run_there_is_known(tmp_path: Path) -> None:
    assert Predictor(model_verified_on(tmp_path, "cpu:fp32"), "cpu", threads=1).share == "4 of 4 nodes"


# -- OpenVINO, where it runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS["openvino"])
def test_openvino_gives_each_image_its_own_answer_at_the_precision_asked_for(
    tmp_path: Path, precision: str
) -> None:
    devices = openvino_devices()
    if precision == "bf16" and not openvino.computes_bf16(devices[0]):
        pytest.skip("this processor has no bf16 arithmetic")
    model = model_verified_on(tmp_path, f"openvino:{precision}")
    predictor = Predictor(model, "openvino", threads=1, precision=precision)
    assert (predictor.provider, predictor.precision) == ("openvino", precision)
    assert predictor.share == "4 of 4 nodes"
    for batch_size in (1, 2, 7):
        colours = [colour_of(i) for i in range(batch_size)]
        pixels = (
            np.zeros((batch_size, SIZE, SIZE, 3), np.uint8) + np.array(colours, np.uint8)[:, None, None]
        )
        expected = [probabilities_for(colour) for colour in colours]
        tolerance = {"fp32": 1e-5, "bf16": 0.05}[precision]
        np.testing.assert_allclose(predictor.predict(pixels), expected, atol=tolerance)


def test_auto_takes_openvino_where_it_was_faster_and_prints_it(tmp_path: Path) -> None:
    openvino_devices()
    model = model_verified_on(tmp_path, "cpu:fp32")
    record_verification(model, ("openvino:fp32", True, 1.3))
    predictor = Predictor(model, "auto", threads=1)
    assert predictor.provider == "openvino"
    assert re.search("cuda: .*; openvino: 1.30 ", predictor.reason)
    model.with_name("verification.json").unlink()
    assert Predictor(model_verified_on(tmp_path, "cpu:fp32"), "auto", threads=1).provider == "cpu"


def test_a_pairing_is_of_provider_and_precision_both() -> None:
    pairing = Pairing("openvino", "bf16", 9, 1.0, 1.0, 0.0, "1.31.1")
    metadata = ModelMetadata(("a", "b"), Preprocess(), verified=(pairing,))
    assert metadata.is_verified("openvino", "bf16")
    assert not metadata.is_verified("openvino", "fp32")
    assert not metadata.is_verified("cpu", "bf16")


def test_a_second_copy_of_the_code_in_a_process_finds_the_plug_in_loaded() -> None:
    """As of a logged model of MLflow, which brings its own copy."""
    pytest.importorskip("onnxruntime_ep_openvino")
    found = openvino.openvino_devices()
    openvino.openvino_devices.cache_clear()
    assert len(openvino.openvino_devices()) == len(found)

"""One ONNX file, one session: the file's own answers, on the provider asked for, or a reason why not."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from serve_model import (
    CLASS_NAMES,
    ON_CPU,
    SIZE,
    build_model,
    colour_of,
    logits_for,
    probabilities_for,
    solid,
)

from serve.contract.metadata import METADATA_KEY, ModelMetadata
from serve.contract.preprocess import Preprocess
from serve.predictor import Predictor
from serve.processors import available_processors

no_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA driver")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.mark.parametrize("batch_size", [1, 2, 7, 32])
def test_each_image_of_a_batch_gets_its_own_answer(model: Path, batch_size: int) -> None:
    colours = [colour_of(i) for i in range(batch_size)]
    predictor = Predictor(model, "cpu", threads=1)
    pixels = np.stack([predictor.preprocess(solid(colour)) for colour in colours])
    logits, probabilities = predictor.run(pixels)
    np.testing.assert_array_equal(predictor.predict(pixels), probabilities)
    assert logits.dtype == probabilities.dtype == np.float32
    np.testing.assert_allclose(logits, [logits_for(c) for c in colours], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(probabilities, [probabilities_for(c) for c in colours], rtol=1e-5)


def test_the_file_alone_says_how_to_score(tmp_path: Path) -> None:
    metadata = ModelMetadata(
        ("고양이", "the dog\n"), Preprocess("pad", 5), model="resnet18", epoch=7, verified=(ON_CPU,)
    )
    path = build_model(tmp_path / "m.onnx", metadata.class_names, 5, metadata=metadata.to_json())
    predictor = Predictor(path, "cpu", threads=1)
    assert predictor.metadata == metadata
    assert predictor.num_classes == 2
    assert predictor.preprocess(solid((9, 9, 9))).shape == (5, 5, 3)


def metadata_with(**changes: Any) -> str:
    metadata = ModelMetadata(CLASS_NAMES, Preprocess("crop", SIZE, SIZE), verified=(ON_CPU,))
    return json.dumps(json.loads(metadata.to_json()) | changes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"metadata": ""}, f"no '{METADATA_KEY}' metadata.*not made by export/main.py"),
        ({"metadata": "{"}, "model metadata is not readable"),
        ({"metadata": metadata_with(format_version=5)}, "format_version 5, this version reads 4"),
        (
            {"metadata": metadata_with(preprocess=Preprocess("squash", 9).to_dict())},
            r"\['batch', 8, 8, 3\].*\[N, 9, 9, 3\]",
        ),
        ({"image_type": TensorProto.FLOAT}, r"tensor\(float\).*tensor\(uint8\)"),
        ({"num_outputs": 4}, r"logits .*\['batch', 4\].*\[N, 3\]"),
        ({"num_outputs": 2}, r"logits .*\['batch', 2\].*\[N, 3\]"),
        ({"outputs": ["logits"]}, "no probabilities.*logits"),
        ({"outputs": ["probabilities"]}, "no logits.*probabilities"),
        ({"batch": 1}, r"images tensor\(uint8\) \[1, 8, 8, 3\]"),
    ],
)
def test_a_model_that_disagrees_with_its_metadata_is_refused(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    path = build_model(tmp_path / "strange.onnx", **options)
    with pytest.raises(ValueError, match=rf"strange\.onnx.*{reason}"):
        Predictor(path, "cpu", threads=1)


def test_what_is_not_a_model_is_refused(tmp_path: Path) -> None:
    for name, contents in (("empty.onnx", b""), ("text.onnx", b"not a model"), ("png.onnx", b"\x89PNG")):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(ValueError, match=name):
            Predictor(tmp_path / name, "cpu", threads=1)
    for name in ("missing.onnx", "."):
        with pytest.raises(ValueError, match="model '"):
            Predictor(tmp_path / name, "cpu")


@no_gpu
def test_cuda_without_a_gpu_is_an_error_never_the_cpu(model: Path) -> None:
    with pytest.raises(ValueError, match=r"'cuda'.*no NVIDIA driver"):
        Predictor(model, "cuda")


@no_gpu
def test_auto_without_a_gpu_is_the_cpu_and_prints_no_alarm(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    predictor = Predictor(model, "auto", threads=1)
    assert predictor.provider == "cpu"
    assert predictor.session.get_providers() == ["CPUExecutionProvider"]
    assert capfd.readouterr() == ("", "")


def test_an_unknown_provider_is_refused_with_the_known_ones(model: Path) -> None:
    with pytest.raises(ValueError, match=r"'tpu'.*auto, cpu, cuda, tensorrt, openvino"):
        Predictor(model, "tpu")


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_inference_threads_are_as_many_as_asked_for(model: Path, threads: int) -> None:
    before = native_threads()
    predictor = Predictor(model, "cpu", threads)
    assert native_threads() - before == threads - 1  # the caller's is one of them
    assert predictor.provider == "cpu"


def test_a_process_confined_to_one_processor_uses_one_thread(model: Path) -> None:
    """As under `taskset` or a cluster's CPU manager, whatever the machine has."""
    counts: list[tuple[int, int]] = []

    def confined() -> None:  # affinity belongs to a thread: this one is thrown away
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        before = native_threads()
        predictor = Predictor(model, "cpu")
        counts.append((available_processors(), native_threads() - before))
        del predictor

    thread = threading.Thread(target=confined)
    thread.start()
    thread.join()
    assert counts == [(1, 0)]


def test_a_negative_number_of_threads_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="--threads -1"):
        Predictor(model, "cpu", threads=-1)

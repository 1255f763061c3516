"""The quantising command: a smaller file that passed its gate, or none, and always the figures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import TrainedRun, code_of

import export.main
import export.quantize
import export.speed
from export.quantize import main, mean_error
from serve.contract.files import file_sha256
from serve.contract.images import load_image
from serve.predictor import Predictor


@pytest.fixture
def run(exported: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(export.quantize, "track", lambda *_: None)
    monkeypatch.setattr(export.speed, "TURN_SECONDS", 0.0)
    return Path(shutil.copytree(exported.folder, tmp_path / "small"))


def entries(run: Path) -> list[dict[str, Any]]:
    values = json.loads((run / "export" / "verification.json").read_text())
    return [values, *values["pairings"]]


def quantize(run: Path, to: str, *arguments: str) -> int:
    """On 24 validation images, one lost is already 4 points."""
    return code_of(main, "--run", run, "--to", to, "--max-accuracy-drop", "5", *arguments)


def test_what_cannot_begin_changes_nothing(run: Path) -> None:
    assert quantize(run, "int8") == 0
    before = {p.name: p.read_bytes() for p in (run / "export").iterdir()}
    assert quantize(run, "int8", "--calibration-images", "0") == 2
    assert quantize(run, "int8", "--training-images", "/nonexistent") == 2
    assert {p.name: p.read_bytes() for p in (run / "export").iterdir()} == before


@pytest.mark.parametrize("to", ["int8", "fp16"])
def test_publishes_a_verified_file_that_is_smaller_and_says_what_it_is(run: Path, to: str) -> None:
    before = file_sha256(run / "export" / "model.onnx")
    assert quantize(run, to) == 0
    file = run / "export" / f"model.{to}.onnx"
    assert sorted(p.name for p in file.parent.iterdir()) == sorted(
        ["model.onnx", file.name, "verification.json"]
    )
    assert file_sha256(run / "export" / "model.onnx") == before
    assert file.stat().st_size < 0.6 * (run / "export" / "model.onnx").stat().st_size

    predictor, whole = Predictor(file, "cpu"), Predictor(run / "export" / "model.onnx", "cpu")
    assert predictor.metadata.precision == to
    assert predictor.metadata.class_names == whole.metadata.class_names
    assert predictor.metadata.checkpoint_sha256 == whole.metadata.checkpoint_sha256
    assert [(p.provider, p.precision) for p in predictor.metadata.verified] == [("cpu", "fp32")]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(predictor.predict(pixels), whole.predict(pixels), atol=0.1)

    main_report, report = entries(run)
    assert main_report["file"] == "model.onnx"
    assert main_report["model_sha256"] == before
    assert (report["file"], report["model_precision"], report["provider"]) == (file.name, to, "cpu")
    assert report["passed"]
    assert report["model_sha256"] == file_sha256(file)
    assert report["num_images"] == 24
    assert report["max_accuracy_drop"] == 0.05
    assert report["images_per_second"].keys() == {f"model.{to}.onnx cpu:fp32", "model.onnx cpu:fp32"}
    assert {"validation_agreement", "log_loss_served", "max_difference_probabilities"} <= report.keys()
    if to == "int8":
        assert report["conversion"]["calibration_images"] == 136
        assert report["conversion"]["pixels_stay_bytes"]


@pytest.mark.parametrize("to", ["int8", "fp16"])
def test_embeddings_stay_an_output_close_to_those_of_float32(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    run = Path(shutil.copytree(trained.folder, tmp_path / "small"))
    for command in (export.main, export.quantize):
        monkeypatch.setattr(command, "track", lambda *_: None)
    monkeypatch.setattr(export.speed, "TURN_SECONDS", 0.0)
    assert export.main.main(["--run", str(run), "--embeddings"]) == 0
    assert quantize(run, to) == 0
    predictors = [Predictor(run / "export" / name, "cpu") for name in ("model.onnx", f"model.{to}.onnx")]
    images = sorted((trained.sample / "test").iterdir())[:8]  # noise would leave the calibrated ranges
    pixels = np.stack([predictors[0].preprocess(load_image(path.read_bytes())) for path in images])
    whole, rounded = (p.session.run(["embeddings"], {"images": pixels})[0] for p in predictors)
    assert np.abs(whole - rounded).max() < 0.1 * np.abs(whole).max()
    assert entries(run)[1]["max_difference_embeddings"] > 0


def test_a_file_that_loses_too_much_is_not_published_not_even_an_older_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(run, "fp16") == 0
    convert = export.quantize.to_fp16

    def damaging(model: onnx.ModelProto) -> onnx.ModelProto:
        """The classes' biases: 0 and a lot."""
        half = convert(model)
        bias = next(i for i in half.graph.initializer if list(i.dims) == [2])
        bias.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 99], np.float16), bias.name))
        return half

    monkeypatch.setattr(export.quantize, "to_fp16", damaging)
    assert quantize(run, "fp16") == 1
    assert sorted(p.name for p in (run / "export").iterdir()) == ["model.onnx", "verification.json"]
    error = capsys.readouterr().err
    assert "FAILED: log loss" in error
    assert "model.fp16.onnx" in error
    main_report, report = entries(run)
    assert main_report["passed"]
    assert not report["passed"]
    assert report["log_loss_served"] > report["log_loss_pytorch"] + 1


def test_layers_that_cost_too_much_stay_in_float32_and_are_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(run, "int8", "--target-error", "1e-9", "--calibration-images", "16") == 0
    search = entries(run)[1]["conversion"]["search"]
    assert search["layers"] == search["measured"] == 5
    assert search["tried"].keys() == {"0", "1", "2"}
    assert search["error"] < search["error_of_all_int8"]
    assert f"float32: {len(search['float_layers'])} (" in capsys.readouterr().out
    graph = onnx.load(run / "export" / "model.int8.onnx").graph
    dequantised = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    in_float = {n.name for n in graph.node if n.op_type == "Conv" and n.input[1] not in dequantised}
    assert in_float == set(search["float_layers"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "export" / "model.onnx").unlink(), "does not exist; make it with"),
        (lambda run: (run / "export" / "verification.json").unlink(), "cannot be read"),
        (lambda run: (run / "export" / "model.onnx").write_bytes(b"x"), "is not the file that"),
        (lambda run: (run / "checkpoints" / "best.pt").unlink(), "no longer in"),
    ],
)
def test_only_a_verified_model_of_an_existing_checkpoint_is_quantised(
    damage: Any, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run)
    assert quantize(run, "int8") == 2
    assert message in capsys.readouterr().err
    assert not (run / "export" / "model.int8.onnx").exists()


def test_the_error_is_of_the_class_that_was_likeliest() -> None:
    expected = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    got = np.array([[0.7, 0.3], [0.2, 0.8]], np.float32)
    assert mean_error(expected, got) == pytest.approx(0.1)

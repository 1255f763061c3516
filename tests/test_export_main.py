"""The export command: publishes a verified model.onnx, or none."""

import json
import shutil
import sqlite3
from pathlib import Path

import mlflow
import numpy as np
import onnx
import pytest
from conftest import TrainedRun
from onnx import numpy_helper

import export.main
from export.convert import convert
from serve.predictor import Predictor
from train.checkpoint import file_sha256


@pytest.fixture
def run(trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run directory, and of its MLflow store in the working directory."""
    shutil.copy(trained.cwd / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")  # MLflow caches by URI
    mlflow.set_tracking_uri(None)
    return Path(shutil.copytree(trained.folder, tmp_path / "small"))


def test_publishes_the_verified_file_and_registers_it(run: Path) -> None:
    assert export.main.main(["--run", str(run), "--register", "pets"]) == 0
    model = run / "export" / "model.onnx"
    report = json.loads((run / "export" / "verification.json").read_text())
    assert report["passed"]
    assert report["model_sha256"] == file_sha256(model)
    assert report["checkpoint_sha256"] == file_sha256(run / "checkpoints" / "best.pt")
    assert Predictor(model, "cpu").metadata.checkpoint_sha256 == report["checkpoint_sha256"]

    version = mlflow.MlflowClient().get_model_version_by_alias("pets", "challenger")
    assert version.run_id == Predictor(model, "cpu").metadata.run_id
    logged = mlflow.models.get_model_info("models:/pets@challenger")
    assert logged.signature.inputs.to_dict()[0]["tensor-spec"]["dtype"] == "uint8"
    assert mlflow.get_run(version.run_id).info.status == "FINISHED"
    with sqlite3.connect("mlflow.db") as db:
        assert db.execute("select count(*) from runs").fetchone() == (1,)
    # what MLflow holds is the very model: it gives the same answers
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    answers = mlflow.pyfunc.load_model("models:/pets@challenger").predict(pixels)
    np.testing.assert_array_equal(answers["probabilities"], Predictor(model, "cpu").predict(pixels))


def tampering(model: object, metadata: object, path: Path) -> None:
    convert(model, metadata, path)
    proto = onnx.load(path)
    bias = next(w for w in proto.graph.initializer if w.name.endswith("classifier.3.bias"))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias)[::-1] + np.float32(0.3), bias.name))
    onnx.save(proto, path)


def test_a_failed_verification_leaves_no_model_not_even_an_older_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "export").mkdir()
    (run / "export" / "model.onnx").write_text("from an earlier export")
    monkeypatch.setattr(export.main, "convert", tampering)
    assert export.main.main(["--run", str(run)]) == 1
    assert [p.name for p in (run / "export").iterdir()] == ["verification.json"]
    assert not json.loads((run / "export" / "verification.json").read_text())["passed"]
    assert "FAILED: logits differ by up to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "checkpoints" / "best.pt").write_bytes(b"x" * 999), "damaged or truncated"),
        (lambda run: (run / "checkpoints" / "best.pt").unlink(), "cannot be read: No such file"),
        (lambda run: (run / "val_predictions.csv").unlink(), "val_predictions.csv cannot be read"),
    ],
)
def test_a_damaged_run_directory_is_one_clear_line(
    damage: object, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(damage)
    damage(run)
    assert export.main.main(["--run", str(run)]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "export" / "model.onnx").exists()


def test_without_its_mlflow_run_the_model_is_published_all_the_same(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mlflow.db").unlink()
    assert export.main.main(["--run", str(run)]) == 0
    assert (run / "export" / "model.onnx").is_file()
    assert "warning: the model is not in MLflow" in capsys.readouterr().err
    assert export.main.main(["--run", str(run), "--register", "pets"]) == 2

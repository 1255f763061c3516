"""The export command: publishes a verified model.onnx, or none."""

import errno
import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
import pandas as pd
import pytest
from conftest import TrainedRun, code_of, copy_of
from onnx import numpy_helper
from serve_model import encode, noise

import export.main
from export.convert import convert
from export.report import Verification
from export.verify import verify
from serve import Classifier
from serve.contract.files import file_sha256
from serve.contract.metadata import VALIDATION_KEY, VERIFIED_BYTES_KEY, VERIFIED_KEY
from serve.predictor import Predictor


@pytest.fixture
def run(trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trained run that is not exported."""
    return copy_of(trained, tmp_path, monkeypatch)


def test_publishes_the_verified_file_and_registers_it(run: Path) -> None:
    assert export.main.main(["--run", str(run), "--register", "pets"]) == 0
    model = run / "export" / "model.onnx"
    report = json.loads((run / "export" / "verification.json").read_text())
    assert report["passed"]
    assert report["model_sha256"] == file_sha256(model)
    assert report["checkpoint_sha256"] == file_sha256(run / "checkpoints" / "best.pt")
    assert report["pairings"] == []
    metadata = Predictor(model, "cpu").metadata
    assert metadata.checkpoint_sha256 == report["checkpoint_sha256"]
    (pairing,) = metadata.verified
    assert (pairing.provider, pairing.precision, pairing.num_images) == ("cpu", "fp32", 24)
    assert pairing.accuracy == report["accuracy_served"]

    version = mlflow.MlflowClient().get_model_version_by_alias("pets", "challenger")
    assert version.run_id == Predictor(model, "cpu").metadata.run_id
    logged = mlflow.models.get_model_info("models:/pets@challenger")
    assert logged.signature.inputs.to_dict()[0]["type"] == "string"
    assert mlflow.get_run(version.run_id).info.status == "FINISHED"
    with sqlite3.connect("mlflow.db") as db:
        assert db.execute("select count(*) from runs").fetchone() == (1,)
    # what MLflow holds is the very model: it gives the same answers
    data = encode(noise(40, 30, 0), "PNG")
    served = mlflow.pyfunc.load_model("models:/pets@challenger").predict(pd.DataFrame({"content": [data]}))
    (answer,) = Classifier(model)([data])
    assert answer.probabilities is not None
    assert served["probabilities"][0] == [float(str(p)) for p in answer.probabilities]


def test_what_is_published_is_byte_for_byte_what_was_verified(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = b""

    def watched(*arguments: Any) -> Verification:
        nonlocal seen
        seen = arguments[2].read_bytes()
        return verify(*arguments)

    monkeypatch.setattr(export.main, "verify", watched)
    assert export.main.main(["--run", str(run)]) == 0
    published = (run / "export" / "model.onnx").read_bytes()
    assert published.startswith(seen)
    appended = onnx.ModelProto.FromString(published[len(seen) :])
    assert [field.name for field, _ in appended.ListFields()] == ["metadata_props"]
    assert [prop.key for prop in appended.metadata_props] == [
        VERIFIED_KEY,
        VERIFIED_BYTES_KEY,
        VALIDATION_KEY,
    ]


def tampering(model: object, metadata: object, path: Path, embeddings: bool) -> None:
    convert(model, metadata, path, embeddings)
    proto = onnx.load(path)
    bias = next(w for w in proto.graph.initializer if w.name.endswith("classifier.3.bias"))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias)[::-1] + np.float32(0.3), bias.name))
    onnx.save(proto, path)


def test_a_failed_verification_leaves_no_model_not_even_an_older_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "export").mkdir()
    for name in ("model.onnx", "model.int8.onnx", "model.fp16.onnx"):
        (run / "export" / name).write_text("from an earlier export")
    monkeypatch.setattr(export.main, "convert", tampering)
    assert export.main.main(["--run", str(run)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert export.main.main(["--run", str(run), "--overwrite"]) == 1
    assert [p.name for p in (run / "export").iterdir()] == ["verification.json"]
    assert not json.loads((run / "export" / "verification.json").read_text())["passed"]
    out, err = capsys.readouterr()
    assert "FAILED: logits" in err
    assert all(name in out for name in ("model.int8.onnx", "model.fp16.onnx"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "checkpoints" / "best.pt").write_bytes(b"x" * 999), "best.pt"),
        (lambda run: (run / "checkpoints" / "best.pt").unlink(), "best.pt"),
        (lambda run: (run / "val_predictions.npz").unlink(), "val_predictions.npz"),
        (lambda run: (run / "val_predictions.npz").write_bytes(b"x" * 999), "val_predictions.npz"),
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


@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 3), (errno.ESTALE, 3), (errno.EACCES, 2)])
def test_only_errors_that_may_pass_are_tried_again(
    run: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number), "model.onnx")

    monkeypatch.setattr(export.main, "convert", fails)
    assert export.main.main(["--run", str(run)]) == code
    assert os.strerror(number) in capsys.readouterr().err


def test_without_its_mlflow_run_the_model_is_published_all_the_same(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mlflow.db").unlink()
    assert export.main.main(["--run", str(run)]) == 0
    assert (run / "export" / "model.onnx").is_file()
    assert "warning: " in capsys.readouterr().err
    assert export.main.main(["--run", str(run), "--register", "pets"]) == 2


# -- further providers -----------------------------------------------------------------------------------


def add(run: Path, pairing: str, *arguments: str) -> int:
    return export.main.main(["--run", str(run), "--verify-provider", pairing, *arguments])


RATES = {"model.onnx openvino:bf16": 60.0, "model.onnx cpu:fp32": 10.0}


def claiming(provider: str) -> Any:
    """A stand-in for another provider of this machine: the CPU's answers under its name."""

    def verify_elsewhere(*arguments: Any) -> Any:
        *others, _, precision, limits = arguments
        report = verify(*others, "cpu", "fp32", limits)
        report.provider, report.precision = provider, precision
        return report

    return verify_elsewhere


def verified(model: Path) -> list[str]:
    predictor = Predictor(model, "cpu", allow_unverified=True)
    return [f"{p.provider}:{p.precision}" for p in predictor.metadata.verified]


def test_a_provider_is_added_and_taken_away_again_when_it_fails(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, record = published / "export" / "model.onnx", published / "export" / "verification.json"
    monkeypatch.setattr(export.main, "Predictor", lambda *_, **__: None)
    monkeypatch.setattr(export.main, "verify", claiming("openvino"))
    monkeypatch.setattr(export.main, "time_pairing", lambda *_: RATES)
    before = file_sha256(model)
    assert add(published, "openvino:bf16") == 0
    assert verified(model) == ["cpu:fp32", "openvino:bf16"]
    report = json.loads(record.read_text())
    assert (report["provider"], report["precision"]) == ("cpu", "fp32")
    (entry,) = report["pairings"]
    assert (entry["provider"], entry["precision"], entry["passed"]) == ("openvino", "bf16", True)
    assert entry["max_accuracy_drop"] == 0.003
    assert entry["images_per_second"] == RATES
    # the file has not changed: its digest identifies it to scoring jobs
    assert report["model_sha256"] == entry["model_sha256"] == file_sha256(model) == before

    def failing(*arguments: Any) -> Any:
        report = claiming("openvino")(*arguments)
        report.passed, report.failures = False, ["another driver"]
        return report

    monkeypatch.setattr(export.main, "verify", failing)
    assert add(published, "openvino:bf16") == 1
    assert verified(model) == ["cpu:fp32"]
    (entry,) = json.loads(record.read_text())["pairings"]
    assert not entry["passed"]
    assert json.loads(record.read_text())["model_sha256"] == file_sha256(model)


def test_the_cpu_can_be_verified_again(published: Path) -> None:
    """As after an update of onnxruntime."""
    assert add(published, "cpu:fp32", "--limit", "10") == 0
    report = json.loads((published / "export" / "verification.json").read_text())
    assert (report["num_images"], report["pairings"]) == (10, [])
    assert verified(published / "export" / "model.onnx") == ["cpu:fp32"]


def test_openvino_is_verified_where_there_is_one(published: Path) -> None:
    from serve_model import openvino_devices

    openvino_devices()
    assert add(published, "openvino:fp32") == 0
    model = published / "export" / "model.onnx"
    (entry,) = json.loads((published / "export" / "verification.json").read_text())["pairings"]
    assert entry["max_difference_probabilities"] < 1e-4
    assert entry["max_accuracy_drop"] is None
    rates = entry["images_per_second"]
    faster = rates["model.onnx openvino:fp32"] >= 1.05 * rates["model.onnx cpu:fp32"]
    assert Predictor(model, "auto").provider == ("openvino" if faster else "cpu")


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize(
    ("pairing", "message"),
    [
        ("cuda:fp32", "no NVIDIA driver"),
        ("cuda:bf16", "--verify-provider 'cuda:bf16' must be one of cpu:fp32, cuda:fp32, cuda:tf32"),
        ("cuda", "--verify-provider 'cuda' must be one of"),
    ],
)
def test_a_provider_that_cannot_be_verified_changes_nothing(
    pairing: str, message: str, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.read_bytes() for p in (published / "export").iterdir()}
    assert add(published, pairing) == 2
    assert message in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (published / "export").iterdir()} == before


@pytest.mark.parametrize("arguments", [("--images", "/nonexistent"), ("--limit", "-5")])
def test_an_export_that_cannot_begin_changes_nothing(published: Path, arguments: tuple[str, ...]) -> None:
    before = {p.name: p.read_bytes() for p in (published / "export").iterdir()}
    assert code_of(export.main.main, "--run", published, *arguments) == 2
    assert {p.name: p.read_bytes() for p in (published / "export").iterdir()} == before


@pytest.mark.parametrize("drop", ["nan", "-1", "inf"])
def test_a_gate_has_a_limit(run: Path, drop: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export.main.main(["--run", str(run), "--max-accuracy-drop", drop])
    assert f"--max-accuracy-drop {drop}" in capsys.readouterr().err


def test_validation_images_may_have_moved(published: Path, sample: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(sample / "train", tmp_path / "moved")
    assert add(published, "cpu:fp32", "--images", str(moved)) == 0
    assert add(published, "cpu:fp32", "--images", str(tmp_path / "nowhere")) == 2

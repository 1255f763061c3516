"""Registering takes what is exported and verified; MLflow has each file once, with the present record."""

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow_store import runs, whole_run
from serve_model import SIZE, build_model

import export.main
from export.convert import describe
from export.publish import track
from export.record import add_report, publish_verified
from export.report import Verification
from serve.contract.files import file_sha256
from serve.contract.metadata import ModelMetadata
from serve.contract.preprocess import Preprocess
from serve.predictor import Predictor
from serve.verification import read_metadata
from train.checkpoint import save_checkpoint

NAMES = ("red", "green", "blue")


def save_best(run: Path, run_id: str, epoch: int = 1) -> ModelMetadata:
    """A checkpoint with what the export reads of it before it builds the network; what describes it."""
    checkpoint: dict[str, Any] = {
        "class_names": list(NAMES),
        "preprocess": Preprocess("crop", SIZE, SIZE).to_dict(),
        "config": {
            "model": "simple_cnn",
            "flip_tta": False,
            "clip_probabilities": 0.0,
            "subject_crop": "none",
        },
        "history": {"best": {"val/accuracy": 0.9}, "best_epoch": epoch},
        "model": {"temperature": torch.tensor(1.0)},
        "ema": None,
        "run_name": "small",
        "run_id": run_id,
        "data_digest": "",
    }
    best = run / "checkpoints" / "best.pt"
    save_checkpoint(checkpoint, best)
    return describe(checkpoint, file_sha256(best))


def publish(run: Path, metadata: ModelMetadata, precision: str = "fp32") -> Path:
    """A model file of a run, with its report."""
    name = "model.onnx" if precision == "fp32" else f"model.{precision}.onnx"
    file = run / "export" / name
    file.parent.mkdir(exist_ok=True)
    values = {**metadata.__dict__, "precision": precision}
    unverified = file.with_name("unverified.onnx")
    build_model(unverified, NAMES, metadata=ModelMetadata(**values).to_json())
    publish_verified(
        unverified, file, Verification(passed=True, provider="cpu", num_images=9, accuracy_served=0.9)
    )
    return file


@pytest.fixture
def run(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def exports(*_: object) -> None:
        raise AssertionError("the run is exported anew")

    monkeypatch.setattr(export.main, "rebuild", exports)
    run = tmp_path / "small"
    publish(run, save_best(run, whole_run().run_id))
    return run


def register(run: Path, *arguments: str) -> int:
    return export.main.main(["--run", str(run), "--register", "pets", *arguments])


def challenger() -> tuple[str, Path]:
    """Its version, and a copy of what MLflow has of it."""
    version = mlflow.MlflowClient().get_model_version_by_alias("pets", "challenger")
    folder = mlflow.artifacts.download_artifacts(
        "models:/pets@challenger", dst_path=f"copy{version.version}"
    )
    return str(version.version), Path(folder)


def test_what_is_exported_is_registered_as_it_is(store: str, run: Path) -> None:
    """With the int8 file and what else the model was verified on, which stay."""
    metadata = ModelMetadata.read(run / "export" / "model.onnx")
    publish(run, metadata, "int8")
    elsewhere = Verification(
        passed=True,
        provider="openvino",
        precision="bf16",
        images_per_second={"model.onnx openvino:bf16": 60.0, "model.onnx cpu:fp32": 10.0},
        model_sha256=file_sha256(run / "export" / "model.onnx"),
    )
    add_report(run / "export", elsewhere)
    before = {path: path.read_bytes() for path in (run / "export").iterdir()}
    assert register(run) == 0
    assert {path: path.read_bytes() for path in (run / "export").iterdir()} == before

    version, copy = challenger()
    assert file_sha256(copy / "model.onnx") == file_sha256(run / "export" / "model.onnx")
    local, logged = (
        Predictor(f, "cpu").metadata for f in (run / "export" / "model.onnx", copy / "model.onnx")
    )
    assert logged == local
    assert {f"{p.provider}:{p.precision}": p.speed for p in logged.verified} == {
        "cpu:fp32": 0.0,
        "openvino:bf16": 6.0,
    }
    (trained,) = runs(store)
    models = [mlflow.MlflowClient().get_logged_model(o.model_id) for o in trained.outputs.model_outputs]
    assert sorted(model.name for model in models) == ["small", "small-int8"]

    assert register(run, "--model-precision", "int8") == 0
    assert Predictor(challenger()[1] / "model.onnx", "cpu").metadata.precision == "int8"
    assert register(run) == 0
    assert challenger()[0] == version, "registered again, it is the same version"
    (trained,) = runs(store)
    assert len(trained.outputs.model_outputs) == 2


def test_the_logged_copy_learns_of_a_later_verification(run: Path) -> None:
    assert register(run) == 0
    report = Verification(provider="cpu", model_sha256=file_sha256(run / "export" / "model.onnx"))
    add_report(run / "export", report)  # as of a later onnxruntime, with which it failed
    track(ModelMetadata.read(run / "export" / "model.onnx"), run)
    with pytest.raises(ValueError, match="verif"):
        Predictor(challenger()[1] / "model.onnx", "cpu")


@pytest.mark.parametrize("why", ["checkpoint", "embeddings", "failed"])
def test_what_is_not_there_is_exported_and_the_reason_is_printed(
    run: Path, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = []
    if why == "checkpoint":
        save_best(run, ModelMetadata.read(run / "export" / "model.onnx").run_id, epoch=2)
    elif why == "embeddings":
        arguments = ["--embeddings"]
    else:
        record = run / "export" / "verification.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"passed": False}))
    with pytest.raises(AssertionError, match="the run is exported anew"):
        register(run, *arguments)
    expected = {
        "checkpoint": "checkpoints",
        "embeddings": "embeddings",
        "failed": "verification.json",
    }
    assert f"{expected[why]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--register", "a/b:c"], "--register a/b:c: "),
        (
            ["--register", "pets", "--model-precision", "int8"],
            "model.int8.onnx",
        ),
        (["--model-precision", "int8"], "--model-precision int8"),
    ],
)
def test_what_cannot_be_registered_is_an_error_before_the_work(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main.main(["--run", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_was_not_tracked_is_not_registered(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_best(run, "")
    assert register(run) == 2
    assert "--track false" in capsys.readouterr().err


def test_an_export_folder_that_cannot_be_written_is_found_before_the_work(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run / "export").iterdir():
        path.unlink()
    (run / "export").rmdir()
    (run / "export").symlink_to("/proc")  # which nobody can write, root neither
    assert export.main.main(["--run", str(run)]) == 2
    assert "/export" in capsys.readouterr().err


def test_a_registered_version_has_what_a_reader_of_the_registry_compares(run: Path) -> None:
    assert register(run) == 0
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("pets", "challenger")
    assert version.tags["purebred.accuracy"] == "0.9000"
    assert version.tags["purebred.classes"] == "3"
    assert version.tags["purebred.verified"] == "cpu:fp32"
    assert "purebred.data_digest" not in version.tags, "the checkpoint has none"
    assert all(text in version.description for text in ("0.9000", "small", *NAMES))

    client.update_model_version("pets", version.version, "mine")
    file = run / "export" / "model.onnx"
    add_report(
        file.parent,
        Verification(
            passed=True,
            provider="openvino",
            precision="bf16",
            images_per_second={"model.onnx openvino:bf16": 60.0, "model.onnx cpu:fp32": 10.0},
            model_sha256=file_sha256(file),
        ),
    )
    track(read_metadata(file), run)
    version = client.get_model_version("pets", version.version)
    assert version.tags["purebred.verified"] == "cpu:fp32, openvino:bf16"
    assert version.description == "mine"

"""A file counts as verified only while it is the very file that was, of a checkpoint that is there."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper
from serve_model import SIZE, build_model

from export import quantize
from export.record import (
    add_report,
    check_models_replaceable,
    publish_verified,
    published_model,
    verified_model,
)
from export.report import Verification
from serve.contract.errors import UserError
from serve.contract.files import file_sha256
from serve.contract.metadata import ModelMetadata
from serve.contract.preprocess import Preprocess
from serve.predictor import Predictor
from serve.verification import read_metadata

ON_THE_CPU: dict[str, Any] = {"passed": True, "provider": "cpu", "num_images": 9, "accuracy_served": 0.9}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a published model.onnx and its checkpoint."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "export").mkdir()
    checkpoint = tmp_path / "checkpoints" / "best.pt"
    checkpoint.write_bytes(b"weights")
    metadata = ModelMetadata(
        ("red", "green", "blue"),
        Preprocess("crop", SIZE, SIZE),
        checkpoint_sha256=file_sha256(checkpoint),
    )
    unverified = tmp_path / "export" / "unverified.onnx"
    build_model(unverified, metadata=metadata.to_json())
    assert publish_verified(unverified, tmp_path / "export" / "model.onnx", Verification(**ON_THE_CPU))
    return tmp_path


def recorded(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "export" / "verification.json").read_text())
    return values


def later(run: Path, **values: Any) -> Verification:
    """As --verify-provider records it, after the file was published."""
    report = Verification(**values)
    report.model_sha256 = file_sha256(run / "export" / report.file)
    add_report(run / "export", report)
    return report


def pairings(run: Path) -> list[str]:
    verified = read_metadata(run / "export" / "model.onnx").verified
    return [f"{pairing.provider}:{pairing.precision}" for pairing in verified]


def test_what_was_verified_is_in_the_file_and_beside_it(run: Path) -> None:
    file, metadata, checkpoint = published_model(run, "fp32")
    assert (file, checkpoint) == (run / "export" / "model.onnx", run / "checkpoints" / "best.pt")
    assert metadata.is_verified("cpu", "fp32")
    assert recorded(run)["model_sha256"] == file_sha256(file)
    assert recorded(run)["accuracy_served"] == 0.9


@pytest.mark.parametrize("size", ["same", "larger"])
def test_a_file_that_another_tool_rewrote_is_not_verified(run: Path, size: str) -> None:
    """Its metadata are all there."""
    path = run / "export" / "model.onnx"
    proto = onnx.load(path)
    if size == "same":
        weights = proto.graph.initializer[0]
        weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * 2, weights.name))
    else:
        proto.doc_string = "simplified"
    onnx.save(proto, path)
    metadata = read_metadata(path)
    assert metadata.class_names == ("red", "green", "blue")
    assert not metadata.is_verified("cpu", "fp32")
    with pytest.raises(UserError, match="--allow-unverified"):
        Predictor(path)
    Predictor(path, allow_unverified=True)


def test_a_second_provider_is_added_and_struck_out_when_it_fails_later(run: Path) -> None:
    before = file_sha256(run / "export" / "model.onnx")
    later(run, passed=True, provider="openvino", precision="bf16")
    assert pairings(run) == ["cpu:fp32", "openvino:bf16"]
    later(run, provider="openvino", precision="bf16", failures=["accuracy dropped"])
    assert file_sha256(run / "export" / "model.onnx") == before
    assert pairings(run) == ["cpu:fp32"]
    (entry,) = recorded(run)["pairings"]
    assert (entry["passed"], entry["failures"]) == (False, ["accuracy dropped"])
    assert published_model(run, "fp32")[1].is_verified("cpu", "fp32")


@pytest.mark.parametrize("passed", [False, None, "true"])
def test_a_model_that_its_record_says_has_failed_is_not_to_be_used(
    run: Path, passed: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the file itself says."""
    assert verified_model(run, "fp32") == published_model(run, "fp32")
    record = json.dumps(recorded(run) | {"passed": passed})
    (run / "export" / "verification.json").write_text(record)
    assert pairings(run) == []
    with pytest.raises(ValueError, match=r"model\.onnx.*verification\.json"):
        verified_model(run, "fp32")
    assert quantize.main(["--run", str(run), "--to", "fp16"]) == 2
    assert "model.onnx" in capsys.readouterr().err
    published_model(run, "fp32")  # so that it can be verified again


def test_a_file_that_is_not_the_verified_one_is_refused(run: Path) -> None:
    with (run / "export" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=r"model\.onnx.*verification\.json"):
        published_model(run, "fp32")


def test_a_model_whose_checkpoint_is_gone_is_refused(run: Path) -> None:
    (run / "checkpoints" / "best.pt").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="checkpoints"):
        published_model(run, "fp32")


def test_a_model_that_was_never_made_is_an_error_with_the_command(run: Path) -> None:
    with pytest.raises(ValueError, match=r"export/quantize\.py --to int8 --run"):
        published_model(run, "int8")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"passed": true}'])
def test_a_record_that_cannot_be_read_is_an_error_that_names_it(run: Path, text: str) -> None:
    (run / "export" / "verification.json").write_text(text)
    with pytest.raises(ValueError, match=r"verification\.json"):
        published_model(run, "fp32")


def test_a_file_that_fails_takes_its_predecessor_and_that_ones_record_with_it(run: Path) -> None:
    model = (run / "export" / "model.onnx").read_bytes()
    derived, unverified = run / "export" / "model.int8.onnx", run / "export" / "unverified.onnx"
    unverified.write_bytes(model)
    assert publish_verified(unverified, derived, Verification(**ON_THE_CPU, model_precision="int8"))
    later(run, passed=True, provider="openvino", file="model.int8.onnx", model_precision="int8")
    assert published_model(run, "int8")[0] == derived
    unverified.write_bytes(model + b"\0")
    assert not publish_verified(unverified, derived, Verification(provider="cpu", model_precision="int8"))
    assert not derived.exists()
    assert [(entry["file"], entry["passed"]) for entry in recorded(run)["pairings"]] == [
        (derived.name, False)
    ]
    published_model(run, "fp32")


def test_a_model_of_another_origin_is_not_replaced(run: Path) -> None:
    folder, name = run / "export", "model.onnx"
    check_models_replaceable(folder, [name, "model.int8.onnx"], overwrite=False)
    (folder / "verification.json").unlink()
    with pytest.raises(ValueError, match="--overwrite"):
        check_models_replaceable(folder, [name], overwrite=False)
    check_models_replaceable(folder, [name], overwrite=True)


def test_a_model_that_was_changed_since_it_was_verified_is_not_replaced(run: Path) -> None:
    model = run / "export" / "model.onnx"
    model.write_bytes(model.read_bytes() + b"\x00")
    with pytest.raises(ValueError, match=r"model\.onnx.*--overwrite"):
        check_models_replaceable(run / "export", [model.name], overwrite=False)

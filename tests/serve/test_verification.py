"""verification.json beside a model file adds to what may be served, for these very bytes alone."""

import json
import shutil
from pathlib import Path

import pytest
from serve_model import build_model, model_verified_on, record_verification

from serve.contract.metadata import ModelMetadata
from serve.predictor import Predictor
from serve.verification import read_metadata

CPU, BF16 = ("cpu:fp32", True, 0.0), ("openvino:bf16", True, 2.5)


def served_with(model: Path) -> dict[str, float]:
    return {f"{p.provider}:{p.precision}": p.speed for p in read_metadata(model).verified}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_verified_on(tmp_path, "cpu:fp32")


def test_a_pairing_of_the_record_is_served_with_and_the_file_stays_as_it_is(model: Path) -> None:
    before = model.read_bytes()
    record_verification(model, CPU, BF16)
    assert served_with(model) == {"cpu:fp32": 0.0, "openvino:bf16": 2.5}
    assert model.read_bytes() == before
    assert [p.provider for p in ModelMetadata.read(model).verified] == ["cpu"]


def test_a_copy_without_its_record_is_served_on_the_cpu_with_a_warning(model: Path, tmp_path: Path) -> None:
    record_verification(model, CPU, BF16)
    (tmp_path / "elsewhere").mkdir()
    copy = Path(shutil.copy(model, tmp_path / "elsewhere" / "pets.onnx"))
    assert served_with(copy) == {"cpu:fp32": 0.0}
    assert not read_metadata(copy).is_verified("openvino", "bf16")
    shutil.copy(model.with_name("verification.json"), copy.parent)
    assert "openvino:bf16" in served_with(copy)


def test_a_record_of_other_bytes_changes_nothing(model: Path) -> None:
    record_verification(model, ("cpu:fp32", False, 0.0), BF16)
    build_model(model, ("a", "b", "c"))
    assert served_with(model) == {"cpu:fp32": 0.0}


def test_a_link_to_a_model_has_the_record_of_its_file(model: Path, tmp_path: Path) -> None:
    record_verification(model, CPU, BF16)
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "current.onnx"
    link.symlink_to(model)
    assert "openvino:bf16" in served_with(link)


def test_what_failed_later_is_served_no_more(model: Path) -> None:
    record_verification(model, ("cpu:fp32", False, 0.0))
    assert served_with(model) == {}
    with pytest.raises(ValueError, match="cpu:fp32"):
        Predictor(model, "cpu")


LIST_OF_RATES = '{"pairings": [], "file": "a", "provider": "b", "precision": "c", "images_per_second": [1]}'


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"pairings": []}', '{"pairings": 3, "file": "a"}', LIST_OF_RATES]
)
def test_a_record_that_cannot_be_read_costs_no_scores(model: Path, text: str) -> None:
    model.with_name("verification.json").write_text(text)
    assert Predictor(model, "auto", threads=1).provider == "cpu"


@pytest.mark.parametrize("rates", [{}, {"model.onnx cpu:fp32": 0.0}, {"model.onnx openvino:bf16": 9.0}])
def test_without_both_rates_a_pairing_counts_as_not_timed(model: Path, rates: object) -> None:
    record_verification(model, CPU, BF16)
    path = model.with_name("verification.json")
    record = json.loads(path.read_text())
    record["pairings"][0]["images_per_second"] = rates
    path.write_text(json.dumps(record))
    assert served_with(model)["openvino:bf16"] == 0.0

"""What was verified is timed beside the default, and said in words."""

from pathlib import Path

import pytest
from serve_model import build_model

from export import speed
from export.report import describe_rates
from export.speed import time_pairing


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "TURN_SECONDS", 0.0)


def test_a_file_is_timed_with_the_default_and_with_other_files(tmp_path: Path) -> None:
    model, other = (build_model(tmp_path / name) for name in ("model.int8.onnx", "model.onnx"))
    rates = time_pairing(model, "cpu:fp32", other)
    assert rates.keys() == {"model.int8.onnx cpu:fp32", "model.onnx cpu:fp32"}
    assert all(rate > 0 for rate in rates.values())


def test_the_default_alone_is_not_timed(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model.onnx")
    assert time_pairing(model, "cpu:fp32", model, tmp_path / "absent.onnx") == {}


def test_a_provider_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.providers.openvino.importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="'openvino'"):
        time_pairing(build_model(tmp_path / "model.onnx"), "openvino:fp32")


def test_the_rates_are_a_line_with_the_slowest_first() -> None:
    rates = {"model.onnx openvino:bf16": 2302.1, "model.onnx cpu:fp32": 48.2}
    expected = "model.onnx cpu:fp32 48.2 images/s; model.onnx openvino:bf16 2,302 images/s (47.76 times)"
    assert describe_rates(rates) == expected

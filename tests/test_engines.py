"""What docs/engines.md shows runs, on images with broken ones among them."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from serve_model import CLASS_NAMES, broken_files, build_model, colour_of, encode, solid

from serve import Classifier


def block(heading: str) -> str:
    """Return the Python below a heading of the page."""
    page = (REPOSITORY / "docs" / "engines.md").read_text(encoding="utf-8")
    (text,) = re.findall(
        r"```python\n(.*?)```", page.split(f"## {heading}\n")[1].split("\n## ")[0], re.DOTALL
    )
    return str(text)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory has the run that the page names."""
    export = tmp_path / "runs" / "NAME" / "export"
    export.mkdir(parents=True)
    shutil.copy(build_model(tmp_path / "model.onnx"), export)
    monkeypatch.chdir(tmp_path)
    return export / "model.onnx"


def test_fastapi_answers_as_the_classifier_does(model: Path) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    names: dict[str, Any] = {}
    exec(compile(block("FastAPI"), "engines.md", "exec"), names)
    images = [encode(solid(colour_of(number)), "PNG") for number in range(6)]
    images += [data for data, _ in broken_files().values()]
    with testclient.TestClient(names["app"]) as client:
        answers = [client.post("/classify", content=data).json() for data in images]
    for got, expected in zip(answers, Classifier(model)(images), strict=True):
        assert got.get("error") == expected.error
        if expected.probabilities is not None:
            assert (got["label"], got["probability"]) == (expected.label, expected.probability)
            assert got["probabilities"] == pytest.approx(
                dict(zip(CLASS_NAMES, expected.probabilities.tolist(), strict=True)), abs=1e-6
            )

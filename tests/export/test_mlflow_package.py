"""The logged model takes image bytes, brings its own code, and answers as scoring does, also over HTTP."""

import base64
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
from conftest import REPOSITORY
from mlflow.pyfunc.scoring_server import invocations
from mlflow_store import log_to_mlflow
from serve_model import (
    CLASS_NAMES,
    METADATA,
    ON_CPU,
    broken_files,
    build_model,
    colour_of,
    encode,
    noise,
    solid,
)
from servers import mlflow_process

import serve.main
from export.mlflow_package import ServedModel, copy_serving_code, pinned_requirements
from serve.contract.files import file_sha256
from serve.contract.metadata import ModelMetadata


@pytest.fixture
def uri(store: str, tmp_path: Path) -> str:
    return log_to_mlflow(build_model(tmp_path / "model.onnx", metadata=METADATA.to_json()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of several formats, with each kind of broken file among them."""
    root = tmp_path / "images"
    root.mkdir()
    for number, suffix in enumerate(["JPEG", "PNG", "WEBP", "GIF"] * 5):
        image = noise(40, 30, number) if number % 2 else solid(colour_of(number), (40, 30))
        (root / f"{number:02}.{suffix.lower()}").write_bytes(encode(image, suffix))
    for name, (data, _) in broken_files().items():
        (root / f"{len(name)}{name}").write_bytes(data)
    return root


def scored(model: Path, folder: Path) -> list[dict[str, str]]:
    """Return the rows of predictions.csv."""
    output = folder.parent / "predictions.csv"
    assert serve.main.main(["--model", str(model), "--images", str(folder), "--output", str(output)]) == 0
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


def check_rows(answers: list[dict[str, Any]], expected: list[dict[str, str]]) -> None:
    assert len(answers) == len(expected)
    for answer, row in zip(answers, expected, strict=True):
        assert (answer["label"], answer["error"]) == (row["label"], row["error"])
        if row["error"]:
            assert answer["probability"] is None
            assert answer["probabilities"] is None
        else:
            assert answer["probability"] == pytest.approx(float(row["probability"]), abs=1e-7)
            probabilities = [float(row[f"probability_{name}"]) for name in CLASS_NAMES]
            assert answer["probabilities"] == pytest.approx(probabilities, abs=1e-7)


def test_in_process_it_answers_as_scoring_does(uri: str, tmp_path: Path, folder: Path) -> None:
    expected = scored(tmp_path / "model.onnx", folder)
    contents = [(folder / row["path"]).read_bytes() for row in expected]
    model = mlflow.pyfunc.load_model(uri, model_config={"threads": 1})
    check_rows(model.predict(pd.DataFrame({"content": contents})).to_dict("records"), expected)
    assert sum(bool(row["error"]) for row in expected) == len(broken_files())


def test_one_logged_model_has_both_flavors_and_the_file_once(
    uri: str, tmp_path: Path, folder: Path
) -> None:
    copy = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "copy")))
    assert file_sha256(copy / "model.onnx") == file_sha256(tmp_path / "model.onnx")
    assert [path.name for path in copy.rglob("*.onnx")] == ["model.onnx"]
    proto = mlflow.onnx.load_model(uri)
    assert [value.name for value in proto.graph.input] == ["images"]
    info = mlflow.models.get_model_info(uri)
    (column,) = info.signature.inputs.to_dict()
    assert (column["name"], column["type"]) == ("content", "string")
    kinds = {column["name"]: column["type"] for column in info.signature.outputs.to_dict()}
    assert kinds == {
        "label": "string",
        "probability": "double",
        "probabilities": "array",
        "error": "string",
    }
    assert info.metadata["class_names"] == list(CLASS_NAMES)
    assert info.flavors["onnx"]["providers"] == ["CPUExecutionProvider"]
    assert info.flavors["python_function"]["config"]["threads"] == 0
    requirements = dict(line.split("==") for line in (copy / "requirements.txt").read_text().splitlines())
    assert {"pillow", "numpy", "pandas", "mlflow"} < requirements.keys()
    assert ON_CPU.onnxruntime in (requirements.get("onnxruntime-gpu"), requirements.get("onnxruntime"))
    answers = mlflow.pyfunc.load_model(uri).predict(info_example(copy))
    assert answers["error"].tolist() == [""]


def info_example(copy: Path) -> pd.DataFrame:
    """Return the input example, whose bytes are base64."""
    return pd.DataFrame(**json.loads((copy / "input_example.json").read_text()))


def test_two_versions_in_one_process_answer_by_their_own_code(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by their own files: the second has its classes in another order."""
    import export.mlflow_package

    first = log_to_mlflow(build_model(tmp_path / "model.onnx", metadata=METADATA.to_json()))
    source = tmp_path / "source" / "serve"
    shutil.copytree(REPOSITORY / "serve", source, ignore=shutil.ignore_patterns("__pycache__"))
    pyfunc = source / "pyfunc.py"
    text = pyfunc.read_text()
    altered = text.replace('answer.label or ""', '(answer.label or "").upper()')
    assert altered != text
    pyfunc.write_text(altered)
    monkeypatch.setattr(export.mlflow_package, "SOURCE", source)
    other = ModelMetadata(CLASS_NAMES[::-1], METADATA.preprocess, verified=(ON_CPU,))
    (tmp_path / "other").mkdir()
    second = log_to_mlflow(build_model(tmp_path / "other" / "model.onnx", metadata=other.to_json()), other)
    image = pd.DataFrame({"content": [encode(solid((250, 0, 0)), "PNG")]})
    models = [mlflow.pyfunc.load_model(uri) for uri in (first, second, first)]
    assert [model.predict(image)["label"].item() for model in models] == ["red", "BLUE", "red"]


def test_the_code_is_named_by_its_content_and_imports_nothing_else_of_ours(tmp_path: Path) -> None:
    name = copy_serving_code(tmp_path / "a", REPOSITORY / "serve")
    assert copy_serving_code(tmp_path / "b", REPOSITORY / "serve") == name
    files = {path.relative_to(tmp_path / "a" / name).as_posix() for path in (tmp_path / "a").rglob("*.py")}
    assert {"__init__.py", "contract/__init__.py", "providers/openvino.py"} < files
    build_model(tmp_path / "model.onnx")
    program = (
        "import sys\n"
        f"from {name}.pyfunc import _load_pyfunc\n"
        "import pandas\n"
        "model = _load_pyfunc('model.onnx')\n"
        "print(model.predict(pandas.DataFrame({'content': [b'']}))['error'].item())\n"
        "assert not {'serve', 'torch', 'train', 'mlflow'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "a")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert "empty file" in done.stdout


def test_pillow_and_onnxruntime_are_those_of_the_verification() -> None:
    versions = {"pillow": "12.5.0", "pi-heif": "1.1.0", "torch": "2.1"}
    pinned = pinned_requirements(replace(METADATA, versions=versions))
    assert {"pillow==12.5.0", "pi-heif==1.1.0"} <= set(pinned)
    assert not any(line.startswith("torch") for line in pinned)


FORMS = {
    "dataframe_split": lambda values: {"columns": ["content"], "data": [[value] for value in values]},
    "dataframe_records": lambda values: [{"content": value} for value in values],
    "inputs": lambda values: {"content": values},
    "instances": lambda values: [{"content": value} for value in values],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "malformed", ["I am no image", "a", "nan", "", None, 3, 2.5, True], ids=lambda value: repr(value)
)
def test_what_is_no_base64_is_an_error_row_and_never_the_whole_request(
    model: tuple[Any, str], form: str, malformed: object
) -> None:
    pyfunc, image = model
    for values in ([image, malformed, image[: len(image) // 2], image], [malformed]):
        answer = invocations(
            json.dumps({form: FORMS[form](values)}),
            "application/json",
            pyfunc,
            pyfunc.metadata.get_input_schema(),
        )
        assert answer.status == 200, answer.response
        rows = json.loads(answer.response)["predictions"]
        assert [row["label"] for row in rows if not row["error"]] == ["red"] * values.count(image)
        assert len(rows) == len(values)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A saved model, and the base64 text of an image."""
    folder = tmp_path_factory.mktemp("saved")
    file = build_model(folder / "model.onnx", metadata=METADATA.to_json())
    ServedModel(file, METADATA).save_model(str(folder / "model"), mlflow.models.Model())
    image = base64.b64encode(encode(solid((250, 0, 0)), "PNG")).decode()
    return mlflow.pyfunc.load_model(str(folder / "model")), image


@pytest.fixture
def address(uri: str, tmp_path: Path) -> Iterator[str]:
    """A server of the logged model."""
    command = ["models", "serve", "--model-uri", uri, "--env-manager", "local", "--workers", "1"]
    with mlflow_process(command, "/ping", tmp_path) as server:
        yield f"{server}/invocations"


@pytest.mark.slow
def test_over_http_it_answers_as_scoring_does_in_every_form(
    address: str, tmp_path: Path, folder: Path
) -> None:
    expected = scored(tmp_path / "model.onnx", folder)
    texts = [base64.b64encode((folder / row["path"]).read_bytes()).decode() for row in expected]
    bodies = [(form, make(texts)) for form, make in FORMS.items()]
    for form, body in [*bodies, ("inputs", texts), ("instances", texts)]:
        answer = requests.post(address, json={form: body}, timeout=60)
        assert answer.ok, answer.text
        check_rows(answer.json()["predictions"], expected)
    for form in FORMS:
        answer = requests.post(address, json={form: FORMS[form]([texts[0], None, "a"])}, timeout=60)
        assert [bool(row["error"]) for row in answer.json()["predictions"]] == [False, True, True]


@pytest.mark.slow
def test_the_example_is_answered_by_the_command_line(uri: str, tmp_path: Path) -> None:
    copy = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "copy")))
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "predict",
        "--model-uri",
        uri,
        "--env-manager",
        "local",
    ]
    command += ["--input-path", str(copy / "serving_input_example.json"), "--output-path", "answer.json"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (row,) = json.loads((tmp_path / "answer.json").read_text())["predictions"]
    assert row["error"] == ""
    assert np.isfinite(row["probability"])

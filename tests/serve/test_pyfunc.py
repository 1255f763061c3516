"""MLflow's table has a row for each image, whatever is wrong with some, and reads base64 in every form."""

import base64
import json
from pathlib import Path

import pandas as pd
import pytest
from mlflow.pyfunc.scoring_server import predictions_to_json
from serve_model import CLASS_NAMES, build_model, colour_of, encode, solid

from serve.processors import available_processors
from serve.pyfunc import DEFAULTS, ImageModel, _load_pyfunc, file_bytes

PNG = encode(solid(colour_of(0), (30, 20)), "PNG")
TEXT = base64.b64encode(PNG).decode()
BYTES = bytes(range(256))  # with each letter of base64, and padding
BYTES_TEXT = base64.b64encode(BYTES).decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ImageModel:
    return _load_pyfunc(str(build_model(tmp_path_factory.mktemp("model") / "model.onnx")))


@pytest.mark.parametrize(
    "content",
    [BYTES, bytearray(BYTES), memoryview(BYTES), BYTES_TEXT, BYTES_TEXT.encode(), base64.encodebytes(BYTES)]
    + [base64.urlsafe_b64encode(BYTES).decode(), f"data:image/png;base64,{BYTES_TEXT}"]
    + [BYTES_TEXT.rstrip("=") + "\n"],
    ids=["bytes", "bytearray", "memoryview", "base64", "base64 as bytes", "base64 in lines"]
    + ["alphabet of URLs", "data URL", "no padding"],
)
def test_bytes_and_base64_are_the_same_file(content: object) -> None:
    assert file_bytes(content) == BYTES


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF"])
def test_no_image_file_is_taken_for_base64(suffix: str) -> None:
    data = encode(solid(colour_of(1), (30, 20)), suffix)
    assert file_bytes(data) is data
    assert file_bytes(base64.b64encode(data)) == data


def test_a_file_of_digits_is_an_image(model: ImageModel) -> None:
    data = b"P3\n2 2\n255\n" + b"255 0 0\n" * 4
    assert file_bytes(data) == data
    answers = model.predict(pd.DataFrame({"content": [data]}))
    assert answers["label"].tolist() == ["red"]


def test_what_is_wrong_with_one_image_is_in_its_row(model: ImageModel, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    bad = [b"", b"broken", None, float("nan"), 3, "%%%", "a", "\u00e9", str(tmp_path / "a.png"), TEXT[:40]]
    table = pd.DataFrame({"content": [PNG, *bad, TEXT]}, index=range(5, 5 + len(bad) + 2))
    answers = model.predict(table)
    assert list(answers.columns) == ["label", "probability", "probabilities", "error"]
    assert answers.index.tolist() == table.index.tolist()
    good, *rows, last = answers.to_dict(orient="records")
    assert good == last
    assert (good["label"], good["error"]) == ("red", "")
    assert len(good["probabilities"]) == len(CLASS_NAMES)
    assert max(good["probabilities"]) == good["probability"]
    for row in rows:
        assert row["error"]
        assert (row["label"], row["probability"], row["probabilities"]) == ("", None, None)


def test_the_answer_is_valid_json(model: ImageModel, tmp_path: Path) -> None:
    answers = model.predict(pd.DataFrame({"content": [PNG, "", "nan"]}))
    assert "0 bytes" in answers["error"].tolist()[1]
    with (tmp_path / "answer.json").open("w") as file:
        predictions_to_json(answers, file)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    rows = json.loads((tmp_path / "answer.json").read_text(), parse_constant=refuse)["predictions"]
    assert [row["probability"] is None for row in rows] == [False, True, True]
    assert "nan" not in [row["label"].lower() for row in rows]


def test_settings_of_model_config_are_the_classifiers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(build_model(tmp_path / "model.onnx"))
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert _load_pyfunc(path).classifier._workers == 3
    assert _load_pyfunc(path, {"threads": 1}).classifier._workers == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert _load_pyfunc(path).classifier._workers == available_processors()
    with pytest.raises(ValueError, match="openvino"):
        _load_pyfunc(path, DEFAULTS | {"provider": "openvino"})

"""From Python come the answers of a scoring job: the same pixels, errors, doubts and gate."""

import csv
import io
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from numpy.typing import NDArray
from PIL import Image
from serve_model import (
    CLASS_NAMES,
    ON_CPU,
    SIZE,
    broken_files,
    build_model,
    colour_of,
    encode,
    probabilities_for,
    solid,
)

import serve.main
from serve import Classifier
from serve.contract.doubts import NARROW
from serve.contract.metadata import ModelMetadata
from serve.contract.preprocess import Preprocess


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than two batches of images, with each kind of broken file among them."""
    root = tmp_path_factory.mktemp("images")
    for number in range(70):
        (root / f"{number:02}.png").write_bytes(encode(solid(colour_of(number), (30, 20)), "PNG"))
    for name, (data, _) in broken_files().items():
        (root / f"{len(name)}{name}").write_bytes(data)
    return root


@pytest.mark.parametrize("kind", ["paths", "bytes"])
def test_answers_are_those_of_predictions_csv(model: Path, folder: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "predictions.csv"
    command = ["--model", str(model), "--images", str(folder), "--output", str(output)]
    assert serve.main.main(command) == 0
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    paths = [folder / row["path"] for row in rows]
    classifier = Classifier(model)
    assert (classifier.class_names, classifier.provider) == (CLASS_NAMES, "cpu")
    answers = classifier(paths if kind == "paths" else [path.read_bytes() for path in paths])
    assert sum(bool(row["error"]) for row in rows) == len(broken_files())
    for row, answer in zip(rows, answers, strict=True):
        texts = (answer.label, answer.probability, answer.error)
        assert ["" if text is None else str(text) for text in texts] == [
            row["label"],
            row["probability"],
            row["error"],
        ]
        expected = [row[f"probability_{name}"] for name in CLASS_NAMES]
        got = [""] * 3 if answer.probabilities is None else [str(p) for p in answer.probabilities]
        assert got == expected


def test_what_is_no_image_is_an_answer_with_an_error(model: Path, tmp_path: Path) -> None:
    data = encode(solid(colour_of(1)), "PNG")
    bad = [b"", None, 3, str(tmp_path), tmp_path / "missing.png", "s3nowhere://a/b", data[:40]]
    answers = Classifier(model, threads=1)([*bad, data, bytearray(data), memoryview(data)])  # type: ignore[list-item]
    assert [answer.error is None for answer in answers] == [False] * len(bad) + [True] * 3
    for answer in answers[: len(bad)]:
        assert (answer.label, answer.probability, answer.probabilities) == (None, None, None)
    for answer in answers[len(bad) :]:
        np.testing.assert_allclose(answer.probabilities, probabilities_for(colour_of(1)), rtol=1e-5)


def test_a_doubtful_picture_is_classified_and_named(model: Path, tmp_path: Path) -> None:
    narrow = np.arange(48 * 40, dtype=np.uint16).reshape(40, 48)
    Image.fromarray(narrow).save(tmp_path / "1.png")
    (answer,) = Classifier(model)([tmp_path / "1.png"])
    assert (answer.doubt, answer.error) == (NARROW, None)
    assert answer.label in CLASS_NAMES


def test_one_image_in_place_of_a_list_is_an_error(model: Path) -> None:
    classifier = Classifier(model)
    assert classifier([]) == []
    file, pixels = io.BytesIO(b"\xff\xd8"), np.zeros((9, 9, 3), np.uint8)
    for image in (b"\xff\xd8", "photo.jpg", Path("photo.jpg"), file, pixels):
        with pytest.raises(TypeError):
            classifier(image)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [0, 1])
def test_threads_share_a_classifier(model: Path, threads: int) -> None:
    classifier = Classifier(model, threads=threads)

    def label_of(number: int) -> str | None:
        (answer,) = classifier([encode(solid(colour_of(number)), "PNG")])
        return answer.label

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(label_of, range(60))) == [CLASS_NAMES[number % 3] for number in range(60)]


def test_calls_at_the_same_time_decode_no_more_than_threads_at_once(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = Classifier(model, threads=2)
    honest, at_once, most = classifier._predictor.preprocess, [0], [0]

    def preprocess(image: Image.Image) -> NDArray[np.uint8]:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        pixels = honest(image.resize((900, 900)).resize((20, 20)))
        at_once[0] -= 1
        return pixels

    monkeypatch.setattr(classifier._predictor, "preprocess", preprocess)
    data = encode(solid(colour_of(0)), "PNG")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: classifier([data]), range(40)))
    assert 1 <= most[0] <= 2


def test_what_was_never_verified_is_refused(tmp_path: Path) -> None:
    pairing = replace(ON_CPU, provider="openvino")
    metadata = ModelMetadata(CLASS_NAMES, Preprocess("crop", SIZE, SIZE), verified=(pairing,))
    model = build_model(tmp_path / "model.onnx", metadata=metadata.to_json())
    with pytest.raises(ValueError, match="cpu:fp32"):
        Classifier(model, "cpu")
    assert Classifier(model, "cpu", allow_unverified=True).provider == "cpu"
    with pytest.raises(ValueError, match="--threads -1"):
        Classifier(model, "cpu", threads=-1)
    with pytest.raises(ValueError, match="--batch-size -1"):
        Classifier(model, allow_unverified=True, batch_size=-1)


def test_the_package_is_imported_at_no_cost_and_classifies_without_torch(model: Path) -> None:
    program = (
        "import sys, serve; assert not {'numpy', 'typing'} & set(sys.modules)\n"
        f"from serve import Classifier; Classifier({str(model)!r})([b''])\n"
        "assert not {'torch', 'mlflow', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)
    with pytest.raises(ImportError):
        from serve import Classifer  # type: ignore[attr-defined]  # noqa: F401


def test_the_lines_in_the_readme_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    (lines,) = [block for block in blocks if "Classifier" in block]
    assert len(lines.splitlines()) <= 10
    export = tmp_path / "runs" / "NAME" / "export"
    export.mkdir(parents=True)
    shutil.copy(model, export / "model.onnx")
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(encode(solid(colour_of(1)), "PNG"))
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "README.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["green", "green"]

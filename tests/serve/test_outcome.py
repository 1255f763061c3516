"""--max-errors and --summary of scoring and of merging, by files and exit codes."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from serve_model import CLASS_NAMES, ON_CPU, broken_files, build_model, colour_of, encode, solid

from serve import main as serve_main
from serve import outcome
from serve.contract.confidence import Threshold
from serve.contract.errors import UserError
from serve.contract.files import file_sha256
from serve.contract.looks import Look, Looks
from serve.contract.metadata import VALIDATION_KEY, VERIFIED_KEY
from serve.contract.profile import ValidationProfile
from serve.merge import main as merge
from serve.predictor import Predictor

NUM_IMAGES = 240


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 images and 8 broken ones."""
    root = tmp_path_factory.mktemp("images")
    for number in range(NUM_IMAGES):
        (root / f"{number:03}.png").write_bytes(encode(solid(colour_of(number % 192)), "PNG"))
    for name, (data, _) in broken_files().items():
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose validation answers lie above 0.96 in 9 of 10 cases."""
    path = build_model(tmp_path_factory.mktemp("model") / "model.onnx")
    looks = Looks()
    for _ in range(1000):
        looks.add(Look(20, 20 / 30, False))
    counts = dict.fromkeys(CLASS_NAMES, 333)
    profile = ValidationProfile(Threshold(0.96, 1000, 900, 900, 50), counts, counts, looks)
    entry = onnx.ModelProto()
    props = {VERIFIED_KEY: json.dumps([ON_CPU.to_dict()]), VALIDATION_KEY: json.dumps(profile.to_dict())}
    onnx.helper.set_model_props(entry, props)
    with path.open("ab") as file:
        file.write(entry.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("x"), 2),
        (FileNotFoundError("x"), 2),
        (IsADirectoryError("x"), 2),
        (OSError(28, "No space left on device"), 3),
        (ConnectionError("x"), 3),
    ],
)
def test_the_exit_code_tells_whether_the_same_call_may_succeed(error: Exception, code: int) -> None:
    assert outcome.report_error(error) == code


def score(model: Path, images: Path, *arguments: object) -> int:
    fixed = ("--model", model, "--images", images, "--batch-size", 4, "--workers", 2)
    return serve_main.main([str(part) for part in (*fixed, *arguments)])


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def test_a_summary_says_what_the_rows_came_to(tmp_path: Path, model: Path, images: Path) -> None:
    out, file = tmp_path / "p.csv", tmp_path / "s.json"
    assert score(model, images, "--output", out, "--summary", file) == 0
    found = read(file)
    rows = out.read_text(errors="replace").splitlines()
    assert found["rows"] == len(rows) - 1 == NUM_IMAGES + 8
    assert found["errors"] == 8 == sum(found["errors_by_kind"].values())
    assert found["predicted"] == dict.fromkeys(CLASS_NAMES, 80)
    assert found["validation"]["class_counts"] == dict.fromkeys(CLASS_NAMES, 333)
    assert found["model_sha256"] == file_sha256(model)
    assert (found["provider"], found["precision"], found["model"]) == ("cpu", "fp32", str(model))
    assert found["seconds"] > 0
    assert found["images_per_second"] > 0
    predictor = Predictor(model, "cpu")
    colours = [solid(colour_of(n % 192)) for n in range(NUM_IMAGES)]
    answers = predictor.predict(np.stack([predictor.preprocess(image) for image in colours]))
    assert found["above_threshold"] == (answers.max(axis=1) > 0.96).sum()
    share = found["above_threshold"] / NUM_IMAGES
    estimated = found["estimated_accuracy"]
    assert estimated["accuracy"] == pytest.approx(share)
    assert estimated["low"] < share < estimated["high"]
    assert found["images_seen"]["short_side_quantiles"][1] == pytest.approx(20, rel=0.1)


def test_a_model_that_is_replaced_meanwhile_is_not_named(
    tmp_path: Path, model: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, wrote = tmp_path / "model.onnx", serve_main.atomic_write
    shutil.copy(model, own)
    scored_with = file_sha256(own)

    def replaces(path: Path) -> Any:
        own.write_bytes(b"another export")
        return wrote(path)

    monkeypatch.setattr(serve_main, "atomic_write", replaces)
    arguments = ("--output", tmp_path / "p.csv", "--summary", tmp_path / "s.json")
    assert score(own, images, *arguments) == 0
    assert read(tmp_path / "s.json")["model_sha256"] == scored_with


@pytest.mark.parametrize(("share", "code"), [("0", 4), ("0.03", 4), ("0.05", 0), ("1", 0)])
def test_too_many_errors_have_an_exit_code_and_all_rows(
    tmp_path: Path, model: Path, images: Path, share: str, code: int
) -> None:
    out = tmp_path / "p.csv"
    assert score(model, images, "--output", out, "--max-errors", share) == code
    assert sum(line.startswith(("0", "1", "2")) for line in out.read_text().splitlines()) == NUM_IMAGES


@pytest.mark.parametrize("share", ["1.5", "-0.1", "nan", "many"])
def test_a_share_is_a_number_from_0_to_1(model: Path, images: Path, share: str) -> None:
    with pytest.raises(SystemExit) as raised:
        score(model, images, "--max-errors", share)
    assert raised.value.code == 2


def test_merging_judges_the_job_and_joins_the_summaries(tmp_path: Path, model: Path, images: Path) -> None:
    whole, parts = tmp_path / "whole.json", tmp_path / "parts"
    assert score(model, images, "--output", tmp_path / "p.csv", "--summary", whole) == 0
    codes = [
        score(model, images, "--output", parts, "--summary", parts, "--shard", f"{i}/3", *more)
        for i, more in enumerate([(), ("--part-size", 8), ("--part-size", 8, "--resume")])
    ]
    assert codes == [0, 0, 0]
    assert len(list(parts.glob("part-*-of-00003.summary.json"))) == 3
    arguments = [str(parts), "--output", str(tmp_path / "all.csv")]
    merged = tmp_path / "merged.json"
    assert merge([*arguments, "--summary", str(merged)]) == 0
    ignored = ("seconds", "images_per_second", "output", "shard")
    expected, found = ({k: v for k, v in read(f).items() if k not in ignored} for f in (whole, merged))
    assert found == expected
    assert merge([*arguments, "--max-errors", "0.01"]) == 4
    assert (tmp_path / "all.csv").read_bytes() == (tmp_path / "p.csv").read_bytes()


def test_the_shards_limit_is_that_of_the_merged_job(tmp_path: Path, model: Path, images: Path) -> None:
    """A shard fails alone when its own errors are too many for the whole job."""
    parts = tmp_path / "parts"
    codes = [
        score(model, images, "--output", parts, "--shard", f"{i}/3", "--max-errors", 0.02) for i in range(3)
    ]
    assert codes == [0, 0, 4]  # the broken files are the last ones
    arguments = [str(parts), "--output", str(tmp_path / "all.csv")]
    assert merge(arguments) == 4
    assert merge([*arguments, "--max-errors", "0.5"]) == 0
    for i in range(3):  # parts that are kept get the limit of the call that keeps them
        flags = ("--shard", f"{i}/3", "--max-errors", 0.5, "--resume")
        assert score(model, images, "--output", parts, *flags) == 0
    assert merge(arguments) == 0


def test_a_resumed_job_has_the_summary_of_all_its_rows(tmp_path: Path, model: Path, images: Path) -> None:
    summary, same = tmp_path / "s.json", {"seconds": 0, "images_per_second": 0}
    arguments = ("--output", tmp_path / "p.csv", "--summary", summary, "--resume", "--part-size", 50)
    assert score(model, images, *arguments) == 0
    first = read(summary)
    assert score(model, images, *arguments) == 0
    assert read(summary) | same == first | same


def test_a_summary_that_cannot_be_written_costs_a_warning(
    tmp_path: Path,
    model: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(outcome, "atomic_write", full)
    out = tmp_path / "p.csv"
    assert score(model, images, "--output", out, "--summary", tmp_path / "s.json") == 0
    assert "warning: " in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == NUM_IMAGES + 9


def test_a_summary_replaces_no_other_file(tmp_path: Path, model: Path, images: Path) -> None:
    (tmp_path / "labels.json").write_text('{"cat": 1}')
    before = file_sha256(model)
    for name in ("labels.json", "p.csv", "p.csv.json", "no/s.json", model):
        file = tmp_path / name
        assert score(model, images, "--output", tmp_path / "p.csv", "--summary", file) == 2
    assert not (tmp_path / "p.csv").exists()
    assert (tmp_path / "labels.json").read_text() == '{"cat": 1}'
    assert file_sha256(model) == before


def test_pairings_have_thresholds_of_their_own(model: Path) -> None:
    from serve.verification import RECORD, read_metadata

    metadata = read_metadata(model)
    own = Threshold(0.7, 100, 80, 80, 10)
    report = {
        **{"file": "model.onnx", "provider": "openvino", "precision": "bf16", "passed": True},
        **{"num_images": 9, "accuracy_served": 1.0, "validation_agreement": 1.0},
        **{"max_difference_probabilities": 0.0, "onnxruntime": "1", "model_sha256": file_sha256(model)},
        "images_per_second": {},
    }
    record = model.with_name(RECORD)
    try:
        for threshold in (own, None):
            kept = report | ({"threshold": asdict(threshold)} if threshold else {})
            record.write_text(json.dumps(kept | {"pairings": []}))
            found = read_metadata(model)
            for pairing, expected in (("cpu fp32", 0.96), ("openvino bf16", threshold and 0.7)):
                profile = found.validation_on(*pairing.split())
                assert profile is not None
                assert (profile.threshold and profile.threshold.probability) == expected
    finally:
        record.unlink()
    assert metadata.validation is not None
    assert replace(metadata.validation, threshold=None) == metadata.validation_on("cuda", "fp32")

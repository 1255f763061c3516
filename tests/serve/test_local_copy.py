"""Models and scores in an object store: what holds for files on a disk holds for objects."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3 import s3_server
from serve_model import broken_files, build_model, colour_of, encode, record_verification, solid

from serve import main as serve_main
from serve import storage
from serve.local_copy import LocalCopy, resolve_model
from serve.merge import main as merge_main
from serve.verification import read_metadata

SCRIPT = Path(__file__).resolve().parents[2] / "serve" / "main.py"


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with s3_server() as client:
        yield client


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number in range(60):
        (root / f"{number:03}.png").write_bytes(encode(solid(colour_of(number)), "PNG"))
    for name, (data, _) in broken_files().items():
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, client: Any) -> str:
    """Of which there is a copy at s3://bucket/models/model.onnx."""
    path = build_model(tmp_path_factory.mktemp("model") / "model.onnx")
    client.upload_file(str(path), "bucket", "models/model.onnx")
    return str(path)


def command(model: str, images: Path, *arguments: object) -> list[str]:
    fixed = ("--model", model, "--images", images, "--batch-size", 4, "--workers", 2)
    return [str(part) for part in (*fixed, *arguments)]


def names(client: Any, prefix: str) -> list[str]:
    found = client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
    return [item["Key"] for item in found]


def content(client: Any, key: str) -> bytes:
    data: bytes = client.get_object(Bucket="bucket", Key=key)["Body"].read()
    return data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: str, images: Path) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "whole.csv"
    assert serve_main.main(command(model, images, "--output", output)) == 0
    return output.read_bytes()


def test_a_model_and_a_file_of_scores(
    client: Any, model: str, images: Path, whole: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "s3://bucket/scores/all.csv"
    assert serve_main.main(command("s3://bucket/models/model.onnx", images, "--output", url)) == 0
    assert content(client, "scores/all.csv") == whole
    assert names(client, "scores/") == ["scores/all.csv"]
    assert f"rows in {url}" in capsys.readouterr().out


def test_shards_of_machines_that_are_killed_and_replaced(
    client: Any, model: str, images: Path, whole: bytes, tmp_path: Path
) -> None:
    """A new machine has nothing but what was published, and scores only what was not."""
    output = "s3://bucket/parts"
    settings = ("--output", output, "--resume", "--part-size", 4)
    arguments = command(model, images, "--shard", "0/2", *settings)
    first = subprocess.Popen([sys.executable, str(SCRIPT), *arguments])
    deadline = time.monotonic() + 60
    while len(names(client, "parts/.part")) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    pieces = [name for name in names(client, "parts/.part") if name.endswith(".json")]
    assert pieces, "some work is kept"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True
    )
    assert f"{4 * len(pieces)} rows from before" in done.stdout
    assert serve_main.main(command(model, images, "--shard", "1/2", *settings)) == 0
    assert sorted(names(client, "parts/")) == [
        f"parts/part-0000{i}-of-00002.csv{suffix}" for i in (0, 1) for suffix in ("", ".json")
    ]
    again = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True
    )
    assert "from before; " in again.stdout
    assert ", 0 images/s" in again.stdout
    assert merge_main([output, "--output", "s3://bucket/merged.csv"]) == 0
    assert content(client, "merged.csv") == whole
    assert merge_main([output, "--output", str(tmp_path / "merged.csv")]) == 0
    assert (tmp_path / "merged.csv").read_bytes() == whole


def test_a_part_that_changed_in_the_store_is_made_again(client: Any, model: str, images: Path) -> None:
    arguments = command(model, images, "--shard", "1/2", "--output", "s3://bucket/changed", "--resume")
    assert serve_main.main(arguments) == 0
    key = "changed/part-00001-of-00002.csv"
    right = content(client, key)
    client.put_object(Bucket="bucket", Key=key, Body=right[:-9])
    assert serve_main.main(arguments) == 0
    assert content(client, key) == right


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("https://example.org/scores.csv", "https://example.org"),
        ("nope://host/scores.csv", "nope://host"),
        ("s3://no-such-bucket/scores.csv", "no-such-bucket"),
        ("s3://bucket/", "--output 's3://bucket/'"),
        ("s3://bucket/..", r"--output '?s3://bucket/\.\."),
    ],
)
def test_what_cannot_be_written_is_an_error_before_anything_is_scored(
    client: Any,
    model: str,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    message: str,
) -> None:
    monkeypatch.setattr(serve_main, "open_source", lambda images: pytest.fail("it began"))
    assert serve_main.main(command(model, images, "--output", output, "--format", "csv")) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert re.search(message, error)


@pytest.mark.parametrize("flag", ["--model", "--images"])
def test_scores_replace_neither_the_model_nor_the_list(
    client: Any, model: str, images: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    url = "s3://bucket/models/model.onnx"
    before = content(client, "models/model.onnx")
    assert serve_main.main(command(model, images, flag, url, "--output", url, "--format", "csv")) == 2
    assert flag in capsys.readouterr().err
    assert content(client, "models/model.onnx") == before


def test_a_model_in_a_store_has_the_record_beside_it_and_errors_name_it(
    client: Any, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model(tmp_path / "model.onnx")
    record_verification(model, ("cpu:fp32", True, 0.0), ("openvino:bf16", True, 2.0))
    url = "s3://bucket/verified/pets.onnx"
    client.upload_file(str(model), "bucket", "verified/pets.onnx")
    with resolve_model(url) as opened:
        assert not read_metadata(opened.path).is_verified("openvino", "bf16")
    client.upload_file(str(model.with_name("verification.json")), "bucket", "verified/verification.json")
    with resolve_model(url) as opened:
        assert read_metadata(opened.path).is_verified("openvino", "bf16")
    output = str(tmp_path / "a.csv")
    assert serve_main.main([*command(url, images, "--output", output), "--provider", "cuda"]) == 2
    broken = "s3://bucket/verified/verification.json"
    assert serve_main.main(command(broken, images, "--output", output)) == 2
    error = capsys.readouterr().err
    assert f"error: {broken}: " in error
    assert "purebred-" not in error


def test_a_part_is_not_merged_over(capsys: pytest.CaptureFixture[str]) -> None:
    part = "s3://bucket/parts/part-00000-of-00002.csv"
    assert merge_main(["s3://bucket/parts/", "--output", part]) == 2
    assert part in capsys.readouterr().err


def test_a_model_that_is_not_there_is_an_error(
    client: Any, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        serve_main.main(command("s3://bucket/models/none.onnx", images, "--output", "s3://bucket/x.csv"))
        == 2
    )
    assert "models/none.onnx" in capsys.readouterr().err


def test_the_url_of_a_run_directory_is_its_exported_model(
    client: Any, model: str, images: Path, whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command("s3://bucket/runs/a", images, "--output", tmp_path / "p.csv")
    assert serve_main.main(arguments) == 2
    assert "export/main.py --run s3://bucket/runs/a" in capsys.readouterr().err
    client.upload_file(model, "bucket", "runs/a/export/model.onnx")
    assert serve_main.main(arguments) == 0
    assert "s3://bucket/runs/a/export/model.onnx" in capsys.readouterr().err
    assert (tmp_path / "p.csv").read_bytes() == whole


def test_summaries_are_published_beside_the_parts(
    client: Any, model: str, images: Path, tmp_path: Path
) -> None:
    parts = "s3://bucket/summed"
    for index in range(2):
        shard = ("--shard", f"{index}/2", "--output", parts, "--summary", parts)
        assert serve_main.main(command(model, images, *shard)) == 0
    found = [json.loads(content(client, f"summed/part-0000{i}-of-00002.summary.json")) for i in range(2)]
    merged = ("--output", "s3://bucket/all.csv", "--summary", "s3://bucket/all.json")
    assert merge_main([parts, *merged]) == 0
    whole = json.loads(content(client, "all.json"))
    assert whole["rows"] == sum(part["rows"] for part in found) == 68
    assert whole["errors"] == sum(part["errors"] for part in found) == 8


def test_when_the_store_goes_away_no_part_is_taken_for_finished(
    client: Any, model: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call may succeed later."""

    def away(path: Path, url: str) -> None:
        if url.endswith(".csv.json"):
            raise OSError("Connection refused")
        honest(path, url)

    honest = storage.put_file
    monkeypatch.setattr(storage, "put_file", away)
    arguments = command(model, images, "--shard", "0/2", "--output", "s3://bucket/away", "--resume")
    assert serve_main.main(arguments) == 3
    assert names(client, "away/") == ["away/part-00000-of-00002.csv"]
    monkeypatch.setattr(storage, "put_file", honest)
    assert serve_main.main(arguments) == 0


def test_a_folder_of_its_own_is_published_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("here")
    copy = LocalCopy(tmp_path)
    copy.fetch(tmp_path / "a")
    copy.fetch_folder(tmp_path)
    copy.publish(tmp_path / "a")
    copy.remove_folder(tmp_path)
    assert (tmp_path / "a").read_text() == "here"


def test_labels_in_the_store_are_not_replaced(client: Any, model: str, images: Path) -> None:
    labels = b"path,label\na.png,cat\n"
    client.put_object(Bucket="bucket", Key="labels.csv", Body=labels)
    arguments = command(model, images, "--output", "s3://bucket/labels.csv")
    assert serve_main.main(arguments) == 2
    assert content(client, "labels.csv") == labels
    assert serve_main.main([*arguments, "--overwrite"]) == 0
    assert serve_main.main(arguments) == 0

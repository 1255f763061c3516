"""gs:// does what s3:// does, the whole way from images to scores: Google's interface on localhost."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SMALL
from forked import train
from fsspec import AbstractFileSystem, filesystem

from export.main import main as export_main
from serve import storage
from serve.local_copy import LocalCopy
from serve.main import main as serve_main
from serve.merge import main as merge_main
from train.data.sample import make_sample

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket() -> Iterator[AbstractFileSystem]:
    """gs://bucket, which this process and its children see."""
    from gcp_storage_emulator.server import create_server  # installed for `make test-all` alone

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        # when it is imported, gcsfs decides by this whether to ask Google itself about each bucket
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield filesystem("gs", use_listings_cache=False)
    server.stop()


def test_objects_are_read_listed_and_removed(bucket: AbstractFileSystem, tmp_path: Path) -> None:
    odd = "gs://bucket/few/b c/ü#?.bin"
    for name in ("few/a.bin", "few/b c/ü#?.bin", "fewer/c.bin"):
        bucket.pipe_file(f"bucket/{name}", name.encode() * 100)
    assert sorted(file.name for file in storage.list_files("gs://bucket/few")) == ["a.bin", "b c/ü#?.bin"]
    assert storage.match("gs://bucket/few/*.bin") == (["gs://bucket/few/a.bin"], 0)
    assert storage.read_object(odd) == "few/b c/ü#?.bin".encode() * 100
    assert storage.read_range("gs://bucket/few/a.bin", 9, 9) == b"few/a.bin"
    storage.get_file(odd, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == storage.read_object(odd)
    copy = LocalCopy(tmp_path, "gs://bucket")
    copy.remove_folder(tmp_path / "few" / "b c")
    copy.remove_folder(tmp_path / "few")
    copy.remove_folder(tmp_path / "few")  # what is not there is no error
    assert [file.name for file in storage.list_files("gs://bucket/fewer")] == ["c.bin"]
    with pytest.raises(FileNotFoundError):
        storage.read_object(odd)


def test_images_and_runs_and_scores_in_a_bucket(
    bucket: AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    make_sample(tmp_path / "sample", train_per_class=40, num_test=12)
    bucket.put(str(tmp_path / "sample"), "bucket/sample", recursive=True)
    settings = [*SMALL, "--epochs", 1, "--track", "false", "--output", "gs://bucket/runs", "--name", "pets"]
    train(2, "--data", "gs://bucket/sample/train", *settings, cwd=tmp_path)
    assert export_main(["--run", "gs://bucket/runs/pets"]) == 0
    model = "gs://bucket/runs/pets/export/model.onnx"
    score = ["--model", model, "--images", "gs://bucket/sample/test"]
    for shard in range(2):
        assert serve_main([*score, "--shard", f"{shard}/2", "--output", "gs://bucket/parts"]) == 0
    assert merge_main(["gs://bucket/parts", "--output", "gs://bucket/scores.csv"]) == 0
    assert serve_main(["--model", model, "--images", "sample/test", "--output", "local.csv"]) == 0
    rows = (tmp_path / "local.csv").read_bytes()
    assert rows.count(b"\n") == 13
    assert storage.read_object("gs://bucket/scores.csv") == rows

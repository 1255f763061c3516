"""Whatever happens to the processes, resuming gives the bytes of a run that nothing happened to."""

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from conftest import REPOSITORY
from forked import call, fork, run
from serve_model import broken_files, build_model, encode, noise, record_verification

from benchmarks.jobs import wait_until
from serve import job
from serve import main as serve_main
from serve.contract.images import read_image_file
from serve.inputs import base
from serve.predictor import Predictor
from serve.shards import Manifest

NUM_IMAGES = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Big enough to be killed over: some milliseconds each."""
    root = tmp_path_factory.mktemp("images")
    for number in range(8):
        (root / f"{number}.png").write_bytes(encode(noise(300, 300, number), "PNG"))
    for number in range(8, NUM_IMAGES):
        os.link(root / f"{number % 8}.png", root / f"{number}.png")
    for name, (data, _) in broken_files().items():
        (root / name).write_bytes(data)
    return root


def command(model: Path, images: Path, *arguments: object) -> list[str]:
    fixed = ("--model", model, "--images", images, "--batch-size", 4, "--part-size", 20, "--workers", 2)
    return [str(part) for part in (*fixed, *arguments)]


def start(arguments: list[str], folder: Path) -> BaseProcess:
    return fork(call, "serve/main.py", arguments, cwd=folder, log=folder.parent / f"{folder.name}.log")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ("out.csv", "out.jsonl"):
        assert serve_main.main(command(model, images, "--output", folder / name)) == 0
    assert serve_main.main(command(model, images, "--output", folder / "parts", "--shard", "1/2")) == 0
    return folder


@pytest.mark.parametrize("output", ["out.csv", "out.jsonl", "parts"])
def test_killed_at_any_moment_and_started_again_the_bytes_are_the_same(
    tmp_path: Path, model: Path, images: Path, undisturbed: Path, output: str
) -> None:
    """After 1, 3 and 5 finished pieces, and some way into the next."""
    shard = ("--shard", "1/2") if output == "parts" else ()
    folder = tmp_path / "killed"
    folder.mkdir()
    arguments = command(model, images, "--output", folder / output, "--resume", *shard)
    for finished in (1, 3, 5):
        process = start(arguments, folder)
        wait_until(lambda: len(list(folder.rglob("*.json"))) >= finished)  # noqa: B023
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start(arguments, folder)
    process.join()
    assert process.exitcode == 0
    name = "parts/part-00001-of-00002.csv" if shard else output
    assert digest(folder / name) == digest(undisturbed / name)
    written = folder / name
    assert sorted(os.listdir(written.parent)) == [written.name, f"{written.name}.json"]


def dying(renames: int, arguments: list[str]) -> object:
    """Score in a process that ends, in place of renaming once more, after so many renames.

    os.replace is how everything appears.
    """
    replace = os.replace

    def dying_replace(*names: str) -> None:
        nonlocal renames
        if renames == 0:
            os._exit(9)
        renames -= 1
        replace(*names)

    os.replace = dying_replace  # type: ignore[assignment]
    return call("serve/main.py", arguments)


def test_a_call_that_is_terminated_leaves_no_unfinished_file(
    tmp_path: Path, model: Path, images: Path
) -> None:
    folder = tmp_path / "ended"
    folder.mkdir()
    arguments = command(model, images, "--part-size", 100_000, "--output", folder / "out.csv")
    process = subprocess.Popen([sys.executable, str(REPOSITORY / "serve" / "main.py"), *arguments])
    wait_until(lambda: bool(list(folder.iterdir())))
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert list(folder.iterdir()) == []


def test_dying_before_any_of_its_renames_loses_one_piece_at_most(
    tmp_path: Path, model: Path, images: Path
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for number in range(50):
        os.link(images / f"{number}.png", few / f"{number}.png")
    assert serve_main.main(command(model, few, "--output", tmp_path / "whole.csv")) == 0
    arguments = command(model, few, "--output", tmp_path / "out.csv", "--resume")
    renames = 0
    while True:
        for leftover in tmp_path.glob("*out.csv*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        process = fork(dying, renames, arguments, cwd=tmp_path, log=tmp_path / "log")
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
        printed = run("serve/main.py", *arguments, cwd=tmp_path)
        kept = min(renames // 2, 3) * 20 if renames < 8 else 50
        kept = min(kept, 50)
        expected = f", {kept} rows from before" if kept else "errors; "
        assert expected in printed, (renames, printed)
        assert digest(tmp_path / "out.csv") == digest(tmp_path / "whole.csv")
        assert not list(tmp_path.glob(".out.csv*"))
        renames += 1
    assert renames == 8  # three pieces, the whole, and a manifest for each


def test_two_processes_at_the_same_shard_are_harmless(
    tmp_path: Path, model: Path, images: Path, undisturbed: Path
) -> None:
    """Kubernetes may run two pods of one index; here they even race a third that is killed."""
    arguments = command(model, images, "--output", tmp_path / "parts", "--shard", "1/2", "--resume")
    processes = [start(arguments, tmp_path) for _ in range(3)]
    wait_until(lambda: bool(list(tmp_path.rglob("*.json"))))
    processes[2].kill()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes[:2]] == [0, 0]
    name = "part-00001-of-00002.csv"
    assert digest(tmp_path / "parts" / name) == digest(undisturbed / "parts" / name)
    assert Manifest.read(tmp_path / "parts" / name).sha256 == digest(tmp_path / "parts" / name)


def test_what_is_finished_is_not_scored_again_and_other_settings_are(
    tmp_path: Path, model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    total = NUM_IMAGES + len(broken_files())

    def run(*arguments: object) -> str:
        assert serve_main.main(command(model, images, "--output", output, *arguments)) == 0
        return capsys.readouterr().out

    assert "from before" not in run("--resume")
    again = f"{NUM_IMAGES} scored, {len(broken_files())} errors, {total} rows from before"
    assert again in run("--resume")
    for other in (("--batch-size", 5), ("--top-k", 1)):
        assert "from before" not in run("--resume", *other)
    assert f" {total} rows from before" in run("--resume", "--top-k", 1)
    output.write_bytes(output.read_bytes()[:-9])  # damaged, and still told to be ours
    assert "from before" not in run("--resume", "--top-k", 1)
    assert "from before" not in run("--top-k", 1)  # not asked to


def test_errors_from_before_heic_could_be_read_are_tried_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(encode(noise(30, 30, 1), "PNG"))
    (tmp_path / "images" / "2.png").write_bytes(b"broken")
    arguments = command(model, tmp_path / "images", "--output", tmp_path / "out.csv", "--resume")
    for versions, kept in (({}, False), ({"pi-heif": "1.1"}, False), ({"pi-heif": "1.1"}, True)):
        monkeypatch.setattr(job, "heic_version", lambda versions=versions: versions)
        assert serve_main.main(arguments) == 0
        assert ("2 rows from before" in capsys.readouterr().out) == kept


def test_a_job_is_resumed_with_the_provider_and_batches_that_auto_took_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A later verification changes no batch size: other batches would be another job."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(encode(noise(30, 30, 1), "PNG"))
    model = build_model(tmp_path / "model.onnx")
    arguments = ["--model", str(model), "--images", str(tmp_path / "images"), "--resume"]
    arguments += ["--output", str(tmp_path / "out.csv")]
    assert serve_main.main([*arguments, "--batch-size", "7"]) == 0
    record_verification(model, ("cpu:fp32", True, 0.0), ("openvino:fp32", True, 9.0))
    monkeypatch.setattr(serve_main, "default_batch_size", lambda predictor: 64)  # as of another provider
    asked: list[str] = []

    def opens(path: Path, provider: str, *others: object, **settings: object) -> Predictor:
        asked.append(provider)
        return Predictor(path, "cpu", threads=1)

    monkeypatch.setattr(serve_main, "Predictor", opens)
    assert serve_main.main(arguments) == 0
    assert asked == ["cpu"]
    assert " 1 rows from before" in capsys.readouterr().out
    assert serve_main.main([*arguments, "--precision", "bf16"]) == 0  # another job
    assert asked == ["cpu", "auto"]


def test_a_part_that_is_scored_again_says_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(encode(noise(30, 30, 1), "PNG"))
    model = build_model(tmp_path / "model.onnx")
    arguments = ["--model", str(model), "--images", str(tmp_path / "images"), "--resume"]
    arguments += ["--output", str(tmp_path / "out.csv")]
    for change, named in (
        ((), ""),
        (("--top-k", "1"), "top_k"),
        (("--batch-size", "3"), "top_k, batch_size"),
        (("--batch-size", "3", "--max-megapixels", "80"), "max_megapixels"),
        (("--batch-size", "3"), "max_megapixels"),
    ):
        assert serve_main.main([*arguments, *change]) == 0
        printed = capsys.readouterr().err
        assert (f"out.csv has another {named}" in printed) == bool(named), printed
    build_model(model, ("a", "b", "c"))
    assert serve_main.main([*arguments, "--batch-size", "3"]) == 0
    assert "out.csv" in capsys.readouterr().err


def test_another_folder_of_the_same_names_is_another_job(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, day in enumerate(("monday", "tuesday")):
        (tmp_path / day).mkdir()
        (tmp_path / day / "1.png").write_bytes(encode(noise(30, 30, number), "PNG"))
    for arguments in (["--output", tmp_path / "out.csv"], ["--output", tmp_path, "--shard", "0/1"]):
        for day in ("monday", "tuesday", "tuesday/"):
            assert serve_main.main(command(model, tmp_path / day, *arguments, "--resume")) == 0
            assert ("from before" in capsys.readouterr().out) == day.endswith("/")


def test_what_an_outage_made_unreadable_is_tried_again(
    tmp_path: Path,
    model: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = tmp_path / "whole.csv"
    assert serve_main.main(command(model, images, "--output", whole)) == 0

    def read(path: str) -> bytes:
        if Path(path).name in {f"1{number:02}.png" for number in range(15)}:
            raise OSError(errno.EIO, "Input/output error")
        return read_image_file(path)

    arguments = command(model, images, "--output", tmp_path / "out.csv", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(base, "read_image_file", read)
        assert serve_main.main(arguments) == 3
    said = capsys.readouterr()
    total = NUM_IMAGES + len(broken_files())
    assert f"15 of {total} " in said.err
    assert (tmp_path / "out.csv").read_text().count("Input/output error") == 15
    assert serve_main.main(arguments) == 0
    assert (tmp_path / "out.csv").read_bytes() == whole.read_bytes()
    resumed = re.search(r"(\d+) rows from before", capsys.readouterr().out)
    assert resumed is not None, "pieces without such errors were scored again"
    assert total - 2 * 20 <= int(resumed[1]) < total
    assert serve_main.main(arguments) == 0
    assert f" {total} rows from before" in capsys.readouterr().out
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_full_or_lost_disk_is_an_error_of_the_system_not_of_the_arguments(
    tmp_path: Path, model: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    assert serve_main.main(command(model, images, "--output", tmp_path / "out.csv")) == 3
    assert os.listdir(tmp_path) == [".out.csv.pieces"]

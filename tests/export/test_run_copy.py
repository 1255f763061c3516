"""A run in an object store is copied as it is, and nowhere else."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from s3 import s3_server

from export.run_copy import open_run_folder


def test_only_what_is_new_in_export_is_published() -> None:
    with s3_server() as client:
        client.put_object(Bucket="bucket", Key="runs/a/config.yaml", Body=b"x")
        client.put_object(Bucket="bucket", Key="runs/a/export/old.onnx", Body=b"old")
        with open_run_folder("s3://bucket/runs/a") as folder:
            assert (folder / "config.yaml").read_bytes() == b"x"
            (folder / "export" / "old.onnx").unlink()
            (folder / "export" / "new.onnx").write_bytes(b"new")
            (folder / "config.yaml").write_bytes(b"not published")
        found = client.list_objects_v2(Bucket="bucket")["Contents"]
        assert [item["Key"] for item in found] == ["runs/a/config.yaml", "runs/a/export/new.onnx"]
        assert client.get_object(Bucket="bucket", Key="runs/a/config.yaml")["Body"].read() == b"x"


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_what_is_printed_and_raised_names_the_run_and_not_its_copy(
    error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    """The copy is gone when it is read."""
    with s3_server() as client:
        client.put_object(Bucket="bucket", Key="runs/a/config.yaml", Body=b"x")

        def fail() -> None:
            with open_run_folder("s3://bucket/runs/a") as folder:
                print(f"verified: {folder}/export/model.onnx")
                print(f"FAILED: {folder}", file=sys.stderr)
                name = str(folder / "best.pt")
                raise error(2, "No such file", name) if error is FileNotFoundError else error(f"{name}: no")

        with pytest.raises(error, match=r"s3://bucket/runs/a/best\.pt") as raised:
            fail()
    assert "purebred-" not in str(raised.value)
    out, err = capsys.readouterr()
    assert "verified: s3://bucket/runs/a/export/model.onnx\n" in out
    assert "FAILED: s3://bucket/runs/a\n" in err


@pytest.mark.parametrize("name", ["/{}/owned", "../owned", "a/./owned", "a//owned"])
def test_an_object_that_would_be_written_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    key = "runs/a/" + name.format(str(tmp_path)[1:])
    with s3_server() as client:
        client.put_object(Bucket="bucket", Key="runs/a/config.yaml", Body=b"x")
        client.put_object(Bucket="bucket", Key=key, Body=b"owned")
        with (
            pytest.raises(ValueError, match="owned"),
            open_run_folder("s3://bucket/runs/a"),
        ):
            pass
    assert not list(tmp_path.iterdir())


def test_without_file_locks_a_run_is_exported_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with open_run_folder(str(tmp_path)) as run:
        assert run == tmp_path
    assert "No locks available" in capsys.readouterr().err


def test_two_exports_of_a_run_come_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import sys; from export.run_copy import open_run_folder\n"
    program += "with open_run_folder(sys.argv[1]):\n    print(flush=True); sys.stdin.read()"
    first = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    assert first.stdin is not None
    assert first.stdout is not None
    first.stdout.readline()
    waits = 0

    def wait(seconds: float) -> None:
        nonlocal waits
        waits += 1
        first.communicate(b"end")

    monkeypatch.setattr("serve.contract.locks.time.sleep", wait)
    with open_run_folder(str(tmp_path)):
        assert waits == 1
        assert first.returncode == 0

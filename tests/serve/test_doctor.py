"""The doctor: each thing that would make a job fail is an error beforehand, and says the way out."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import REPOSITORY
from serve_model import build_model

from serve import doctor
from serve.doctor import (
    main,
    mlflow_server,
    own_name,
    processors,
    readable,
    resolves,
    shared_memory,
    writable,
)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_a_healthy_machine_is_ok_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").write_text("x")
    model = build_model(tmp_path / "model.onnx")
    code = run(
        *("--write", tmp_path, "--read", tmp_path, "--free", "0.001", "--shm", "0.001"),
        *("--model", model, "--provider", "cpu", "--resolve", "localhost", "--mlflow", "sqlite:///m.db"),
    )
    lines = capsys.readouterr().out.splitlines()
    assert code == 0, lines
    assert len(lines) == 7
    assert all(line.startswith(("ok ", "warning processors")) for line in lines)


def test_it_imports_neither_torch_nor_mlflow_and_runs_as_a_module() -> None:
    code = (
        "import runpy, sys\nsys.argv = ['doctor', '--write', '/tmp', '--free', '0']\n"
        "try: runpy.run_module('serve.doctor', run_name='__main__')\n"
        "except SystemExit as end: print(end.code)\n"
        "print({'torch', 'torchvision', 'mlflow', 'train'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["0", "set()"], done.stdout + done.stderr


def test_too_little_shared_memory_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    finding = shared_memory(1e12, tmp_path)
    assert finding.level == "error"
    assert "1000000000000 are needed" in finding.message
    assert "emptyDir" in finding.message
    assert shared_memory(1, tmp_path).level == "ok"
    assert shared_memory(1, tmp_path / "absent").level == "error"
    assert shared_memory(0, tmp_path / "absent").level == "warning"


def test_the_64_mib_of_a_container_are_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = doctor.shutil.disk_usage(tmp_path)._replace(total=64 * 2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert shared_memory(0, tmp_path).level == "warning"
    assert shared_memory(64, tmp_path).level == "ok"


def test_more_threads_than_the_quota_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("100000 100000")
    assert processors(1, 1, tmp_path).level == "ok"
    assert processors(0, 1, tmp_path).level == "ok"
    assert processors(2, 1, tmp_path).level == "warning"
    finding = processors(1, 4, tmp_path)
    assert finding.level == "warning"
    assert all(text in finding.message for text in ("quota 1", "4 processes", "1 threads"))
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert processors(0, 1, tmp_path).level == "warning"


def test_a_provider_that_is_not_there_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model(tmp_path / "model.onnx")
    assert run("--model", model, "--provider", "cuda") == 1
    assert "error   onnxruntime: " in capsys.readouterr().out
    assert run("--model", tmp_path / "absent.onnx") == 2
    assert run("--model", "s3://bucket/model.onnx") == 0
    (tmp_path / "text.onnx").write_text("no model")
    assert run("--model", tmp_path / "text.onnx") == 1


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    finding = writable(Path("/proc/sys"), 0)
    assert finding.level == "error"
    assert f"user {os.getuid()}" in finding.message
    file = tmp_path / "file"
    file.touch()
    assert writable(file / "below", 0).level == "error"


def test_a_folder_to_come_is_judged_by_the_one_above_it_and_nothing_is_left(tmp_path: Path) -> None:
    finding = writable(tmp_path / "runs" / "first", 0)
    assert finding.level == "ok"
    assert str(tmp_path) in finding.message
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_full_is_an_error(tmp_path: Path) -> None:
    finding = writable(tmp_path, 1e9)
    assert finding.level == "error"
    assert "1e+09 are needed" in finding.message


def test_what_is_read_must_be_there_and_hold_something(tmp_path: Path) -> None:
    assert readable(str(tmp_path)).level == "error"
    assert readable(str(tmp_path / "absent")).level == "error"
    (tmp_path / "a").write_text("x")
    assert readable(str(tmp_path)).level == "ok"
    assert readable(str(tmp_path / "a")).level == "ok"
    (tmp_path / "a").write_text("")
    assert readable(str(tmp_path / "a")).level == "error"
    assert "not tried" in readable("s3://bucket/photos").message


def test_a_name_without_an_address_is_an_error_that_names_the_service() -> None:
    assert resolves("localhost", 0).level == "ok"
    finding = resolves("train-multinode-0.invalid", 0)
    assert finding.level == "error"
    assert "headless Service" in finding.message
    for name in ("a..b", "x" * 70):
        assert resolves(name, 0).level == "error"


def test_it_waits_for_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "RETRY_SECONDS", 0.01)
    tries = []

    def getaddrinfo(host: str, port: None) -> list[object]:
        tries.append(host)
        if len(tries) < 3:
            raise OSError("not yet")
        return [(2, 1, 6, "", ("10.0.0.1", 0))]

    monkeypatch.setattr(doctor.socket, "getaddrinfo", getaddrinfo)
    assert resolves("pod-0.service", time.monotonic() + 30).level == "ok"
    assert len(tries) == 3


def test_a_name_of_torchruns_that_does_not_lead_to_this_machine_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert own_name("localhost").level == "ok"
    assert own_name("192.0.2.1").level == "error"  # of documentation: no machine has it
    assert own_name("a..b").level == "error"
    monkeypatch.setattr(doctor.socket, "getfqdn", lambda: "4f1c.invalid")
    monkeypatch.setattr(doctor, "RETRY_SECONDS", 1e6)  # no waiting: nothing will change
    assert run("--wait", "120", "--processes", "2") == 1
    assert "--local-addr" in capsys.readouterr().out
    assert run("--wait", "120") == 0


class Server(BaseHTTPRequestHandler):
    code: int
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Authorization", ""))
        self.send_response(self.code)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: object) -> None: ...


@contextmanager
def serving(code: int = 200) -> Iterator[tuple[str, list[str]]]:
    """A server that answers so, and the authorizations that it got."""
    seen: list[str] = []
    handler = type("Handler", (Server,), {"code": code, "seen": seen})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def test_an_mlflow_server_that_answers_is_ok_with_or_without_a_slash_at_the_end() -> None:
    with serving() as (uri, _):
        assert mlflow_server(uri, 0).level == "ok"
        assert mlflow_server(uri + "/", 0).level == "ok"


@pytest.mark.parametrize(
    ("code", "way_out"), [(403, "--allowed-hosts"), (401, "MLFLOW_TRACKING_TOKEN"), (500, "500")]
)
def test_a_server_that_refuses_is_a_warning_with_the_way_out(code: int, way_out: str) -> None:
    with serving(code) as (uri, _):
        finding = mlflow_server(uri, 0)
    assert finding.level == "warning"
    assert way_out in finding.message


def test_the_clients_credentials_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (uri, seen):
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t")
        mlflow_server(uri, 0)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "u")
        mlflow_server(uri, 0)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p")
        mlflow_server(uri, 0)
    assert seen == ["Bearer t", "Bearer t", "Basic dTpw"]


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "http://name.invalid:5000", "http://["])
def test_no_server_is_a_warning_because_training_continues_without_it(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--mlflow", uri) == 0
    assert "warning MLflow" in capsys.readouterr().out
    assert run("--mlflow", uri, "--strict") == 1


def test_what_answers_in_another_protocol_is_a_warning() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=answer, daemon=True).start()
        finding = mlflow_server(f"http://127.0.0.1:{server.getsockname()[1]}", 0)
    assert (finding.level, "SSH" in finding.message) == ("warning", True)


def test_a_folder_that_cannot_be_looked_into_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def exists(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", exists)
    assert "set fsGroup" in writable(Path("/locked/runs"), 0).message


def test_unusable_arguments_are_exit_code_2() -> None:
    with pytest.raises(SystemExit, match="2"):
        run("--free", "much")


def test_what_will_not_pass_is_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Jobs give up on 2, and try again after 1."""
    assert run("--read", tmp_path / "absent") == 2
    assert run("--read", tmp_path) == 2  # it is empty
    assert run("--write", tmp_path, "--free", "1e9") == 1  # others may free some
    assert run("--write", tmp_path, "--free", "1e9", "--read", tmp_path / "absent") == 2
    monkeypatch.setattr(
        doctor.os, "scandir", lambda _: (_ for _ in ()).throw(OSError(errno.ESTALE, "stale"))
    )
    assert run("--read", tmp_path) == 1  # the store may be back

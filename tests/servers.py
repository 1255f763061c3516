"""Servers of MLflow in processes of their own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import requests


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def mlflow_process(arguments: Sequence[str], health: str, cwd: Path) -> Iterator[str]:
    """Run `python -m mlflow ARGUMENTS` with a free port until the block ends; yield its address once
    `health` answers."""
    port = free_port()
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it starts uvicorn by its name
    with (cwd / "server.log").open("wb") as log:
        server = psutil.Popen(
            [sys.executable, "-m", "mlflow", *arguments, "--port", str(port)],
            cwd=cwd,
            env=os.environ | {"PATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        while True:
            try:
                if requests.get(address + health, timeout=5).ok:
                    break
            except requests.RequestException:
                pass
            running = server.poll() is None and time.monotonic() < deadline
            assert running, (cwd / "server.log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        for process in [*(server.children(recursive=True) if server.poll() is None else []), server]:
            process.kill()
        server.wait()

"""Several runs at once against a real MLflow server on PostgreSQL, as a team has it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import mlflow
import pytest
from conftest import REPOSITORY, SMALL
from servers import free_port, mlflow_process

pytestmark = pytest.mark.slow
RUNS = 2
EPOCHS = 2
USER = "postgres"  # whom Debian's package makes; a server refuses to run as root
PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=Path("/no")).parent


@contextmanager
def postgresql() -> Iterator[str]:
    """URI of an empty database in a cluster of its own."""
    if not (PROGRAMS / "initdb").exists():
        pytest.skip("PostgreSQL's server is not installed")
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install '.[server]'")
    user = USER if os.geteuid() == 0 else None
    manifest = (REPOSITORY / "k8s" / "components" / "mlflow" / "server.yaml").read_text()
    (scheme,) = re.findall(
        r"value: (postgresql\S*?)://", manifest
    )  # with the driver that is installed there
    with tempfile.TemporaryDirectory(prefix="postgresql-", ignore_cleanup_errors=True) as folder:
        if user:
            shutil.chown(folder, user)
        data, port = Path(folder) / "data", free_port()
        command = [
            PROGRAMS / "initdb",
            "--pgdata",
            data,
            "--username",
            "mlflow",
            "--auth",
            "trust",
            "--no-sync",
        ]
        subprocess.run(command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL)
        settings = ["-p", str(port), "-k", folder, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        server = subprocess.Popen(
            [PROGRAMS / "postgres", "-D", data, *settings],
            user=user,
            cwd=folder,
            stderr=subprocess.DEVNULL,
        )
        try:
            ready = [PROGRAMS / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
            deadline = time.monotonic() + 60
            while subprocess.run(ready, check=False).returncode and time.monotonic() < deadline:
                time.sleep(0.1)
            yield f"{scheme}://mlflow@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()
            server.wait()


def mlflow_server(folder: Path, store: str) -> AbstractContextManager[str]:
    command = ["server", "--backend-store-uri", store, "--serve-artifacts", "--workers", "2"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    return mlflow_process(command, "/health", folder)


def test_runs_at_the_same_time_are_whole_and_apart(sample: Path, tmp_path: Path) -> None:
    with postgresql() as store, mlflow_server(tmp_path, store) as address:
        command = [
            sys.executable,
            str(REPOSITORY / "train" / "main.py"),
            "--data",
            str(sample / "train"),
            *SMALL,
        ]
        command += ["--epochs", str(EPOCHS), "--precision", "fp32"]
        jobs = [
            subprocess.Popen(
                [*command, "--name", f"run{number}", "--seed", str(number)],
                cwd=tmp_path,
                env=os.environ | {"MLFLOW_TRACKING_URI": address, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(RUNS)
        ]
        for job in jobs:
            printed, _ = job.communicate(timeout=300)
            assert job.returncode == 0, printed
            warnings = [line for line in printed.splitlines() if line.lower().startswith("warning")]
            assert not any("MLflow" in line for line in warnings)
        client = mlflow.MlflowClient(address)
        runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        assert sorted(run.info.run_name for run in runs) == [f"run{number}" for number in range(RUNS)]
        for run in runs:
            assert run.info.status == "FINISHED"
            assert run.data.params["seed"] == run.info.run_name.removeprefix("run")
            for name in ("train/loss", "val/loss", "val/accuracy", "lr"):
                steps = [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
                assert steps == list(range(1, EPOCHS + 1)), name
            assert "best.pt" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}

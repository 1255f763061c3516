"""Shared by the tests: the drawn sample set, a command runner, and one run trained with torchrun."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from train.sample import make_sample

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = ["--model", "simple_cnn", "--image-size", "32", "--batch-size", "32"]
SMALL += ["--optimizer", "adamw", "--lr", "2e-3"]


def launch(*command: object, cwd: Path, code: int = 0, timeout: float = 900) -> str:
    """Run a command, check its exit code, return what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PYTHONPATH"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def torchrun(processes: int, *arguments: object, cwd: Path, code: int = 0, root: Path = REPOSITORY) -> str:
    """`torchrun --nproc_per_node=N train/main.py ...`, by path."""
    program = Path(sys.executable).with_name("torchrun")
    script = root / "train" / "main.py"
    return launch(
        program, f"--nproc_per_node={processes}", "--standalone", script, *arguments, cwd=cwd, code=code
    )


@dataclass(frozen=True)
class TrainedRun:
    cwd: Path
    """Where it was started; holds mlflow.db."""
    folder: Path
    sample: Path
    printed: str


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "sample"
    make_sample(root, train_per_class=80, num_test=20)
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> TrainedRun:
    """Two epochs of four processes, started from a folder of its own."""
    cwd = tmp_path_factory.mktemp("job")
    printed = torchrun(
        4,
        "--data",
        sample / "train",
        *SMALL,
        "--epochs",
        2,
        "--name",
        "small",
        "--precision",
        "fp32",
        cwd=cwd,
    )
    return TrainedRun(cwd, cwd / "runs" / "small", sample, printed)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new SQLite store of MLflow takes seconds to make: once."""
    import mlflow

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Iterator[str]:
    """The working directory with an empty store in it; its URI."""
    import mlflow
    from mlflow_store import use

    from train import mlflow_run

    monkeypatch.chdir(tmp_path)  # the default store and its artifacts are in the working directory
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setattr(mlflow_run, "SYSTEM_METRICS_SECONDS", 60)
    monkeypatch.setattr(mlflow_run, "RETRY_SECONDS", 0.2)
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    use(monkeypatch, uri)
    yield uri
    mlflow.end_run()
    mlflow.set_tracking_uri(None)

"""Shared by the tests: limits of threads, the drawn sample set, one trained run, one exported model."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: two pytest workers share the processors
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = ["--model", "simple_cnn", "--image-size", "32", "--batch-size", "32"]
SMALL += ["--optimizer", "adamw", "--lr", "2e-3"]


def code_of(main: Callable[[list[str]], int], *arguments: object) -> int:
    """Return the exit code of a command, also of one that ends while it reads its flags."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)


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
    """A finished run. Tests that change it take a copy."""

    cwd: Path
    """Where it was started; holds mlflow.db."""
    folder: Path
    sample: Path
    printed: str


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first of pytest's workers to need it fills for all of them."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / f"shared-{name}"
    with FileLock(f"{folder}.lock"):
        if not folder.with_suffix(".made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            folder.with_suffix(".made").touch()
    return folder


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from train.data.sample import make_sample

    def make(folder: Path) -> None:
        make_sample(folder / "sample", train_per_class=80, num_test=20)

    return once(tmp_path_factory, "sample", make) / "sample"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, sample: Path, empty_store: Path) -> TrainedRun:
    """Two epochs of two ranks, logged to MLflow, started from a folder of its own."""
    import forked

    def make(folder: Path) -> None:
        shutil.copy(empty_store, folder)
        settings = [
            "--data",
            sample / "train",
            *SMALL,
            "--epochs",
            2,
            "--name",
            "small",
            "--precision",
            "fp32",
        ]
        forked.train(2, *settings, cwd=folder)

    cwd = once(tmp_path_factory, "trained", make)
    return TrainedRun(cwd, cwd / "runs" / "small", sample, (cwd / "small.log").read_text())


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, trained: TrainedRun) -> TrainedRun:
    """A copy of `trained` with its verified model.onnx, which is in MLflow too."""
    import forked

    def make(folder: Path) -> None:
        for file in trained.cwd.iterdir():
            copy = shutil.copytree if file.is_dir() else shutil.copy
            copy(file, folder / file.name)
        forked.run("export/main.py", "--run", folder / "runs" / "small", cwd=folder)

    cwd = once(tmp_path_factory, "exported", make)
    return TrainedRun(cwd, cwd / "runs" / "small", trained.sample, trained.printed)


def copy_of(source: TrainedRun, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run directory, as if it had been moved here, and its MLflow store in the working directory."""
    import mlflow

    from train.tracking.run_record import FILE, read_record

    shutil.copy(source.cwd / "mlflow.db", folder / "mlflow.db")
    monkeypatch.chdir(folder)
    mlflow.set_tracking_uri(None)  # which deletes the variable
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")  # MLflow caches by URI
    run = Path(shutil.copytree(source.folder, folder / "small"))
    if record := read_record(run / FILE):
        record.folder = ""  # else it would be another run in MLflow, as the first one is still there
        record.save(run / FILE)
    return run


@pytest.fixture
def published(exported: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An exported run, whose model is in its MLflow run."""
    return copy_of(exported, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new SQLite store of MLflow takes seconds to make: once."""

    def make(folder: Path) -> None:
        import mlflow

        mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()

    return once(tmp_path_factory, "store", make) / "mlflow.db"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Iterator[str]:
    """The working directory with an empty store in it; its URI."""
    import mlflow
    from mlflow_store import use

    from train.tracking import mlflow_tracker, sender

    monkeypatch.chdir(tmp_path)  # the default store and its artifacts are in the working directory
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setattr(sender, "SYSTEM_METRICS_SECONDS", 60)
    monkeypatch.setattr(sender, "SCHEMA_SECONDS", 0.2)
    monkeypatch.setattr(mlflow_tracker, "RETRY_SECONDS", 0.2)
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    use(monkeypatch, uri)
    yield uri
    mlflow.end_run()
    mlflow.set_tracking_uri(None)

"""The wheel holds the programs, their commands and the recipes, and works without the clone."""

import shutil
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL, launch

from serve.contract.command_line import INSTALLED


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy: setuptools leaves a folder `build` beside the sources."""
    root = tmp_path_factory.mktemp("wheel")
    for name in ("train", "export", "serve", "pipelines", "k8s", "tests"):
        shutil.copytree(
            REPOSITORY / name, root / "source" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, root / "source")
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", root]
    launch(sys.executable, *build, root / "source", cwd=root)
    (path,) = root.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return bin/ of a fresh environment with the wheel, which sees the libraries that the tests have."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel]
    launch(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # a path alone: the tests' own installation of purebred, a .pth file there, is not followed
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.mark.slow  # builds a wheel, and imports torch in each process
def test_the_wheel_has_the_packages_and_recipes_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        *("train", "export", "serve", "pipelines")
    }
    for needed in ("train/recipes/from_scratch.yaml", "train/evaluation/report.html", "serve/commands.py"):
        assert needed in names
    sources = {
        path.relative_to(REPOSITORY).as_posix()
        for package in ("train", "export", "serve", "pipelines")
        for path in (REPOSITORY / package).rglob("*.py")
    }
    assert sources <= set(names)


@pytest.mark.slow
def test_installed_commands_train_export_score_and_merge_from_any_folder(
    environment: Path, sample: Path, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('the module of the user')\n")

    def call(name: str, *arguments: object, code: int = 0) -> str:
        return launch(environment / name, *arguments, cwd=tmp_path, code=code)

    for name in INSTALLED.values():
        assert f"{name} " in call(name, "--help")
    assert "from_scratch" in call("purebred-train", "--help")
    flags = ["--data", sample / "train", *SMALL, "--epochs", 1, "--track", "false"]
    recipe = ["--config", "from_scratch", "--retune-epochs", 0]
    output = call("purebred-train", *recipe, *flags, "--eval-size", 0, "--start-size", 0, "--name", "a")
    assert "purebred-export --run runs/a" in output
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = ["--no-python", environment / "purebred-train"]
    launch(environment / "python", *torchrun, *script, *flags, "--name", "b", cwd=tmp_path)
    call("purebred-export", "--run", "runs/a")
    call("purebred-score", "--model", "runs/a", "--images", sample / "test", "--output", "p.csv")
    call("purebred-score", "--model", "runs/a", "--images", sample / "test", "--shard", "0/1")
    call("purebred-merge", "predictions", "--output", "merged.csv")
    assert (tmp_path / "merged.csv").read_bytes() == (tmp_path / "p.csv").read_bytes()
    call("purebred-compare", "runs/a", "runs/b")
    call("purebred-evaluate", "--model", "runs/a", "--data", sample / "train", "--no-track")
    call("purebred-report", "--run", "runs/a")
    assert "--lr" in call("purebred-train", "--learning-rate", 1, code=2)
    assert "ok " in call("purebred-doctor", *flags)


@pytest.mark.slow
def test_torchrun_starts_the_installed_module(environment: Path, sample: Path, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "train.main"]
    flags = ["--data", sample / "train", *SMALL, "--epochs", 1, "--track", "false", "--name", "a"]
    output = launch(environment / "python", *torchrun, *flags, cwd=tmp_path)
    assert "purebred-export --run runs/a" in output

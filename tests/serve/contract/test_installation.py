"""A command whose packages are missing says which extra to install; a user's own serve.py hides none."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from serve.contract.installation import require

COMMANDS = [
    path
    for package in ("train", "export", "serve")
    for path in sorted((REPOSITORY / package).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text() and path.name != "sample.py"
]
NEED_TRAINING = [path for path in COMMANDS if path.parent.name != "serve"]
# As on a machine with the base installation alone: what stands for torch and the like cannot be found.
SERVING_ALONE = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
missing = {"torch", "torchvision", "timm", "mlflow", "optuna", "cleanlab", "onnx", "jsonargparse"}
importlib.util.find_spec = lambda name, *rest: None if name in missing else find(name, *rest)
sys.modules.update(dict.fromkeys(missing))
name, by_path = sys.argv[1], sys.argv[2] == "path"
sys.argv[1:] = []
runpy.run_path(name, run_name="__main__") if by_path else runpy.run_module(name, run_name="__main__")
"""


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(REPOSITORY).as_posix() for path in paths]


@pytest.mark.parametrize("how", ["path", "module"])
@pytest.mark.parametrize("command", ["train/main.py", "train/sync.py", "export/main.py"])
def test_the_serving_installation_says_what_to_install(command: str, how: str) -> None:
    name = command if how == "path" else command.removesuffix(".py").replace("/", ".")
    done = subprocess.run(
        [sys.executable, "-c", SERVING_ALONE, name, how], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "pip install '.[train]'" in line


@pytest.mark.parametrize("command", names(NEED_TRAINING))
def test_every_command_of_training_asks_before_it_imports(command: str) -> None:
    statements = ast.parse((REPOSITORY / command).read_text()).body
    asked = next(i for i, s in enumerate(statements) if ast.unparse(s).startswith("require("))
    for statement in statements[:asked]:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            module = getattr(statement, "module", None) or statement.names[0].name
            assert module.partition(".")[0] in {*sys.stdlib_module_names, "serve"}, module


def test_what_is_installed_is_not_asked_for() -> None:
    require("train", "numpy", "PIL")
    with pytest.raises(SystemExit) as ended:
        require("train", "numpy", "no_such_package")
    assert ended.value.code == 2


@pytest.mark.parametrize("command", names(COMMANDS))
def test_every_command_puts_the_repository_first(command: str) -> None:
    text = (REPOSITORY / command).read_text()
    ours = re.search(r"^from (serve|train|export)\.", text, re.MULTILINE)
    assert ours is not None
    assert "sys.path[0] = str(Path(__file__).resolve().parents[1])" in text[: ours.start()]


@pytest.mark.parametrize("place", ["working directory", "PYTHONPATH"])
@pytest.mark.parametrize("command", ["serve/main.py", "serve/merge.py", "serve/doctor.py"])
def test_a_users_own_modules_of_these_names_do_no_harm(tmp_path: Path, command: str, place: str) -> None:
    for name in ("serve", "train", "export"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the module of the user')\n")
    path = str(tmp_path) if place == "PYTHONPATH" else ""
    done = subprocess.run(
        [sys.executable, REPOSITORY / command, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout

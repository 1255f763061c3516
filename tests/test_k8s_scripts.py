"""k8s/entrypoint.sh, with a stand-in for python."""

import os
import subprocess
from pathlib import Path

from manifests import K8S

PYTHON = '#!/bin/sh\nfor argument in "$@"; do printf \'%s\\n\' "$argument"; done\n'


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def entrypoint(tmp_path: Path, *arguments: str, code: int = 0) -> list[str]:
    """What it starts python with."""
    program(tmp_path / "bin" / "python", PYTHON)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        [K8S / "entrypoint.sh", *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done.stdout.splitlines()


def test_each_action_is_one_command_with_its_arguments_untouched(tmp_path: Path) -> None:
    train = ["--standalone", "train/main.py", "--name=first"]
    assert entrypoint(tmp_path, "train", *train) == ["-m", "train.launch", *train]
    assert entrypoint(tmp_path, "export", "--run", "a b") == ["export/main.py", "--run", "a b"]
    assert entrypoint(tmp_path, "sync", "runs/a b") == ["train/sync.py", "runs/a b"]
    assert entrypoint(tmp_path, "score", "*") == ["serve/main.py", "*"]
    assert entrypoint(tmp_path, "merge", "x") == ["serve/merge.py", "x"]
    assert entrypoint(tmp_path, "doctor") == ["-m", "serve.doctor"]


def test_another_action_is_refused_with_the_code_that_is_not_tried_again(tmp_path: Path) -> None:
    assert entrypoint(tmp_path, "serve", code=2) == []

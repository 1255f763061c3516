"""The quickstart: the stages in order, each with flags that its program takes."""

import json
import subprocess
from pathlib import Path

import pytest

from pipelines import quickstart
from train.cli import parse_config


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Programs and their arguments, recorded in place of being run."""
    programs: dict[str, list[str]] = {}

    def record(program: str, *arguments: object, processes: int = 1) -> None:
        programs[program] = [*map(str, arguments), f"processes={processes}"]
        if program == "export/main.py":
            Path("runs/sample/export").mkdir(parents=True)
            verified = {"accuracy_served": 0.98765, "num_images": 180}
            Path("runs/sample/export/verification.json").write_text(json.dumps(verified))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "run_program", record)
    return programs


def test_each_stage_takes_what_the_one_before_it_has_written(
    started: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs/sample").mkdir(parents=True)
    Path("runs/sample/left").touch()
    assert quickstart.main() == 0
    assert list(started) == ["train/data/sample.py", "train/main.py", "export/main.py", "serve/main.py"]
    *flags, processes = started["train/main.py"]
    config = parse_config(flags)
    assert (config.data, f"{config.output}/{config.name}") == ("data/sample/train", "runs/sample")
    assert processes == "processes=2"
    assert "runs/sample" in started["export/main.py"]
    assert {"runs/sample/export/model.onnx", "data/sample/test"} <= set(started["serve/main.py"])
    assert not Path("runs/sample/left").exists()
    printed = capsys.readouterr().out
    assert "0.988" in printed
    assert "180" in printed
    assert "runs/sample/predictions.csv" in printed


def test_the_exit_code_is_that_of_the_step_that_failed(
    started: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: str, *arguments: object, processes: int = 1) -> None:
        raise subprocess.CalledProcessError(3, program)

    monkeypatch.setattr(quickstart, "run_program", fail)
    assert quickstart.main() == 3

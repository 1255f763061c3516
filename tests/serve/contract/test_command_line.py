"""Every command's help and errors have one form, whatever is typed: one line, exit code 2."""

import argparse
import re
import tomllib
from collections.abc import Callable
from functools import partial
from importlib import import_module

import pytest
from conftest import REPOSITORY

import serve.contract.command_line as command_line
from serve.contract.command_line import INSTALLED, CommandLine, Number, command

PARSERS = {
    path.relative_to(REPOSITORY).as_posix(): import_module(
        path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".")
    ).build_parser
    for path in [*REPOSITORY.glob("*/*.py"), *REPOSITORY.glob("train/data/convert_parquet.py")]
    if path.parent.name in ("serve", "export", "pipelines", "train", "data")
    and "def build_parser() -> argparse" in path.read_text()
    and '__name__ == "__main__"' in path.read_text()
}
PARSERS["serve/main.py"] = import_module("serve.arguments").build_parser


def error_of(parse: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parse()
    assert ended.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    (line,) = written.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("program", sorted(PARSERS))
def test_help_names_each_flag_with_hyphens_a_text_and_one_form_of_defaults(program: str) -> None:
    parser = PARSERS[program]()
    assert isinstance(parser, CommandLine)
    text = " ".join(parser.format_help().split())
    assert f"usage: {command(program)} " in text
    assert "default: %" not in text
    assert not re.search(r"; default: |: default: ", text)
    for action in parser._actions:
        assert action.help, action.option_strings
        assert not [flag for flag in action.option_strings if "_" in flag and flag != "--nproc_per_node"]


@pytest.mark.parametrize("program", sorted(PARSERS))
def test_an_unknown_flag_is_an_error_before_a_missing_one(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(lambda: PARSERS[program]().parse_args(["--no-such-flag"]), capsys)
    assert "--no-such-flag" in line
    assert f"{command(program)} --help" in line


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--input", "x"], ["--input", "--images"]),
        (["--top-k", "-3"], ["--top-k", "-3", "0 or more"]),
        (["--top_k", "many"], ["--top-k", "'many'", "integer"]),
        (["--max-errors", "1.5"], ["--max-errors", "1.5", "0..1"]),
        (["--max-errors", "nan"], ["--max-errors", "nan", "0..1"]),
        (["--format", "xml"], ["--format", "xml", "csv", "jsonl", "parquet"]),
        (["--images"], ["--images"]),
        ([], ["--model, --images"]),
        (["--resume=yes", "--model", "m", "--images", "i"], ["--resume", "yes"]),
        (["--model", "m", "--images", "i", "more"], ["more"]),
        (["--model", "m", "--images", *(f"{i}.jpg" for i in range(999))], ["1.jpg", "quotes"]),
        (["--mod", "m"], ["--mod", "--model"]),
    ],
)
def test_errors_name_flag_value_and_limit(
    typed: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(lambda: PARSERS["serve/main.py"]().parse_args(typed), capsys)
    for word in words:
        assert word in line
    assert len(line) < 300


def test_underscores_and_home_folders_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    args = PARSERS["serve/main.py"]().parse_args(["--model=~/m", "--images", "~/i", "--batch_size", "8"])
    assert (args.model, args.images, args.batch_size) == ("/home/someone/m", "/home/someone/i", 8)
    assert (
        PARSERS["pipelines/sweep.py"]()
        .parse_args(["--trials", "1", "--study", "s", "--nproc-per-node", "2"])
        .nproc_per_node
        == 2
    )


def test_flags_of_training_belong_behind_the_divider(capsys: pytest.CaptureFixture[str]) -> None:
    for program in ("pipelines/sweep.py", "pipelines/label_issues.py", "pipelines/pseudo_label.py"):
        parser = PARSERS[program]()
        assert "--epochs" in (line := error_of(partial(parser.parse_args, ["--epochs", "3"]), capsys))
        assert "follow --" in line


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "x"])
def test_a_number_has_limits(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        Number(float)(text)
    assert Number(int, 1)("1") == 1


def test_installed_commands_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert list(scripts) == list(INSTALLED.values())
    assert all((REPOSITORY / program).is_file() for program in INSTALLED)
    assert command("export/main.py") == "python export/main.py"
    monkeypatch.setattr(command_line.sys, "orig_argv", ["/x/python", "/x/purebred-train", "--data", "d"])
    assert command("export/main.py") == "purebred-export"
    assert command("train/sync.py") == "python -m train.sync"
    monkeypatch.undo()
    monkeypatch.setattr(command_line, "is_repository", lambda: False)
    assert command("export/main.py") == "purebred-export"

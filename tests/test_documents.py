"""Links of the documents resolve, their commands pass the programs' own parsers, their Python compiles."""

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from torch.distributed.run import get_args_parser

from serve.contract.command_line import INSTALLED
from serve.contract.errors import UserError
from train.cli import parse_unchecked, read_flags
from train.config import SETTINGS
from train.settings import check_needs, flag

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
HISTORY = ("CHANGELOG.md", "experiments.md")  # name flags and files that were
SHELL = ("", "sh", "bash", "shell", "console")
STARTS = re.compile(
    r"(python|torchrun|make|pytest|purebred-|(train|export|serve|pipelines|benchmarks|k8s)/)"
)
BEFORE = re.compile(r"\$|sudo|time|\w+=\S*")
SEPARATOR = re.compile(r"[|&;<>()]+")
PLACEHOLDER = re.compile(r"(--[\w-]+=)?[A-Z][A-Z_]*")
TRAININGS = ("train/main.py", "benchmarks/digits.py", "pipelines/doctor.py")  # all take its flags
PASS_ON = ("benchmarks/overhead.py", "benchmarks/test_times.py")  # hand flags that they lack to others


def each(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(REPOSITORY)))


each_page = each(PAGES)


# ---- links


@each_page
def test_every_relative_link_and_its_anchor_resolve(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", without_blocks(page))
    links = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_that_the_code_names_exists() -> None:
    folders = ("train", "export", "serve", "pipelines", "benchmarks", "tests", "k8s")
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*")]
    files += [REPOSITORY / "pyproject.toml", REPOSITORY / "Makefile"]
    for path in files:
        if path.suffix in (".py", ".yaml", ".toml", ".sh", ".html", "") and path.is_file():
            for name in re.findall(r"docs/[\w/]+\.(?:md|png|jpg)", path.read_text(encoding="utf-8")):
                assert (REPOSITORY / name).is_file(), f"{path} names {name}"


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, by GitHub's rule; a repeated one ends in -1, -2, ..."""
    seen: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#{1,6} +(.*?)[ #]*$", without_blocks(page), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)  # a link shows its text
        anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if anchor in seen else anchor)
        seen[anchor] = seen.get(anchor, 0) + 1
    return found


# ---- commands


@each_page
def test_every_command_in_a_block_is_read_by_the_program_that_it_starts(page: Path) -> None:
    found = [words for block in blocks(page, *SHELL) for words in commands(block)]
    assert [f"{' '.join(words)}: {wrong}" for words in found if (wrong := problem(words))] == []


@each([page for page in PAGES if page.name not in HISTORY])
def test_every_flag_of_a_command_within_a_line_is_known_to_its_program(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", without_blocks(page))
    found = [words for span in spans for words in commands(span)]
    assert [f"{' '.join(words)}: {wrong}" for words in found if (wrong := unknown(words))] == []


@pytest.mark.parametrize(
    "line",
    [
        "python train/main.py --data DIR --learning-rate 1",
        "python train/main.py --data DIR --epochs few",
        "torchrun --nproc_per_node=2 train/main.py --teacher-share 0.3",  # has no effect without --teacher
        "torchrun --nodes=2 train/main.py",
        "python train/nothing.py",
        "python -m serve.doctor --nothing",
        "purebred-score --model model.onnx",
        "cd runs && python export/main.py --nothing | tee log",
        "k8s/pipeline.py cpu --run first --nothing",
        "python pipelines/sweep.py --study NAME -- --nothing 1",
        "python benchmarks/serve.py --nothing",
        "sudo make nothing",
        "pytest tests/nothing.py",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    assert any(problem(words) for words in commands(line))


@each_page
def test_every_python_block_compiles(page: Path) -> None:
    for block in blocks(page, "python", "py"):
        compile(block, str(page), "exec", dont_inherit=True)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *``` *$", re.DOTALL | re.MULTILINE)


def without_blocks(page: Path) -> str:
    """Return the text of a page but for its fenced blocks."""
    return FENCE.sub("", text_of(page))


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of a page in these languages ("" is none), without their indent."""
    found = FENCE.findall(text_of(page))
    return [
        re.sub(f"^{indent}", "", body, flags=re.MULTILINE)
        for indent, kind, body in found
        if kind in languages
    ]


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command that starts something of ours, without comments and redirections."""
    for line in re.sub(r" *\\\n *", " ", text).splitlines():
        if not any(STARTS.match(word) for word in line.split()):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = [*lexer, ";"]
        except ValueError:  # a quotation over several lines
            continue
        while words:
            end = next(i for i, word in enumerate(words) if SEPARATOR.fullmatch(word))
            command, words = words[:end], words[end + 1 :]
            while command and BEFORE.fullmatch(command[0]):
                command = command[1:]
            if command and STARTS.match(command[0]):
                yield command


def program(words: list[str]) -> tuple[str, list[str]]:
    """Return what a command starts, a path like train/main.py or else its first word, and the arguments."""
    name, *rest = words
    installed = {command: path for path, command in INSTALLED.items()}
    if name in installed:
        return installed[name], rest
    if name.startswith("python") and rest[:1] == ["-m"]:
        path = f"{rest[1].replace('.', '/')}.py"
        return (path if (REPOSITORY / path).is_file() else rest[1]), rest[2:]
    return (rest[0], rest[1:]) if name.startswith("python") and rest else (name, rest)


def problem(words: list[str]) -> str:
    """Return what is wrong with a command, or ""; words in capitals stand for paths and numbers."""
    name, arguments = program(words)
    arguments = [
        re.sub("[A-Z_]+$", "1", word) if PLACEHOLDER.fullmatch(word) else word
        for word in arguments
        if word != "FLAGS"  # those of a training
    ]
    try:
        return read(name, arguments)
    except SystemExit as ended:
        return f"exit code {ended.code}" if ended.code else ""
    except UserError as error:
        return str(error)


def read(name: str, arguments: list[str]) -> str:
    """Return what is missing for a command, or ""; the program's parser raises what is wrong with flags."""
    if name == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        return " ".join(word for word in arguments if "=" not in word and word not in targets)
    if name == "pytest":
        return " ".join(word for word in arguments if "/" in word and not (REPOSITORY / word).exists())
    if name in ("torchrun", "train/launch.py"):
        launched = get_args_parser().parse_args(arguments)
        started = [launched.training_script, *launched.training_script_args]
        return problem(started if launched.no_python else ["python", *started])
    if not name.endswith(".py"):
        return ""
    if not (REPOSITORY / name).is_file():
        return f"{name} does not exist"
    if name == "benchmarks/measure.py":
        return problem(arguments)
    if name in TRAININGS:
        if name == "pipelines/doctor.py":
            arguments = re.sub(r"--nproc_per_node[= ]\d+", "", " ".join(arguments)).split()
        check_needs(parse_unchecked(arguments))
        return ""
    divider = arguments.index("--") if "--" in arguments else len(arguments)
    own, after = arguments[:divider], arguments[divider + 1 :]
    parser = parser_of(name)
    if name in PASS_ON:
        parser.parse_known_args(own)
    elif name == "k8s/pipeline.py":
        parser.parse_intermixed_args(own)
    else:
        parser.parse_args(own)
    read_flags(after)
    return ""


def unknown(words: list[str]) -> str:
    """Return the flags of a command, or of a part of one, that its program lacks."""
    script = next((i for i, word in enumerate(words) if word.endswith(".py") and "/" in word), None)
    if script is None:
        return read(*program(words)) if words[0] in ("make", "pytest") else ""
    name, arguments = words[script], words[script + 1 :]
    if not (REPOSITORY / name).is_file():
        return f"{name} does not exist"
    divider = arguments.index("--") if "--" in arguments else len(arguments)
    given = [
        word.partition("=")[0].replace("_", "-") for word in arguments[:divider] if word.startswith("--")
    ]
    if not given or name in PASS_ON:
        return ""
    return " ".join(each for each in given if each not in flags_of(name))


@cache
def flags_of(name: str) -> set[str]:
    """Return the flags of a program, a path, with hyphens."""
    if name in TRAININGS:
        return {"--config", "--help", "--nproc-per-node", *(flag(setting) for setting in SETTINGS)}
    return {each.replace("_", "-") for action in parser_of(name)._actions for each in action.option_strings}


class FoundError(Exception):
    """Ends a program where it would read its arguments; holds its parser."""


@cache
def parser_of(name: str) -> argparse.ArgumentParser:
    """Return the parser of a program, a path: its main is called, and ends where it reads arguments."""

    def stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise FoundError(parser)

    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name])
        for method in ("parse_args", "parse_known_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, method, stop)
        try:
            module.main()
        except FoundError as found:
            parser: argparse.ArgumentParser = found.args[0]
            return parser
    raise AssertionError(f"{name} reads no arguments")

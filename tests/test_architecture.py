"""The pages that describe the code show the code."""

import ast
import re
from collections import defaultdict

from conftest import REPOSITORY

from benchmarks.draw_packages import BEGIN, END, STAGES, picture


def test_the_extent_of_the_packages_is_drawn_from_the_code() -> None:
    shown = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    assert shown == picture(), "python benchmarks/draw_packages.py draws it anew"


INTERFACES = {"main", "run", "build_parser", "matches", "read"}  # of every command, and of every layout


def test_no_class_or_function_has_its_name_in_two_modules() -> None:
    modules = defaultdict(set)
    for stage in STAGES:
        for path in (REPOSITORY / stage).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                    modules[node.name].add(str(path.relative_to(REPOSITORY)))
    twice = {name: found for name, found in modules.items() if len(found) > 1 and name not in INTERFACES}
    assert twice == {}


def test_every_source_file_that_the_pages_name_exists() -> None:
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
    named = re.compile(r"`((?:train|export|serve|pipelines|benchmarks|tests|k8s)/[\w/]+\.(?:py|sh|yaml))")
    for page in pages:
        if page.name in ("CHANGELOG.md", "experiments.md"):  # what was, and what was tried
            continue
        for path in named.findall(page.read_text(encoding="utf-8")):
            assert (REPOSITORY / path).is_file(), f"{page.name} names {path}"

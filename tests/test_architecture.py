"""The pages that describe the code show the code."""

import re

from conftest import REPOSITORY

from benchmarks.draw_packages import BEGIN, END, picture


def test_the_picture_of_the_packages_is_drawn_from_the_code() -> None:
    shown = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    assert shown == picture(), "python benchmarks/draw_packages.py draws it anew"


def test_every_source_file_that_the_pages_name_exists() -> None:
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
    named = re.compile(r"`((?:train|export|serve|pipelines|benchmarks|tests|k8s)/[\w/]+\.(?:py|sh|yaml))")
    for page in pages:
        if page.name in ("CHANGELOG.md", "experiments.md"):  # what was, and what was tried
            continue
        for path in named.findall(page.read_text(encoding="utf-8")):
            assert (REPOSITORY / path).is_file(), f"{page.name} names {path}"

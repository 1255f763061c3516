"""Names of numbered classes in a JSON file beside a label file."""

import json
from pathlib import Path
from typing import Any

import pytest

from serve.contract.errors import UserError
from train.data.layouts.label_names import read_class_names

NAMES = {"0": "healthy", "1": "rust"}


@pytest.mark.parametrize("content", [NAMES, {"healthy": 0, "rust": 1}])
def test_names_are_used_if_their_numbers_are_the_labels(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "map.json").write_text(json.dumps(content))
    assert read_class_names(tmp_path / "l.csv", {"0", "1"}, exactly=True) == (NAMES, "map.json")
    assert read_class_names(tmp_path / "l.csv", {"1"}, exactly=False) == (NAMES, "map.json")
    for labels in ({"1"}, {"0", "1", "2"}, {"a", "b"}):
        assert read_class_names(tmp_path / "l.csv", labels, exactly=True) == ({}, "")


@pytest.mark.parametrize(
    "content", [["a", "b"], {"0": "a", "1": "a"}, {"0": "a", "1": 2}, {"0": "a", "1": ""}]
)
def test_anything_else_is_not_used(tmp_path: Path, content: Any) -> None:
    (tmp_path / "map.json").write_text(json.dumps(content))
    (tmp_path / "broken.json").write_text("{")
    assert read_class_names(tmp_path / "l.csv", {"0", "1"}, exactly=True) == ({}, "")


def test_two_files_of_other_names_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(NAMES))
    (tmp_path / "b.json").write_text(json.dumps(NAMES))
    assert read_class_names(tmp_path / "l.csv", {"0", "1"}, exactly=True)[0] == NAMES
    (tmp_path / "b.json").write_text(json.dumps({"0": "rust", "1": "healthy"}))
    with pytest.raises(UserError, match=r"a\.json and b\.json"):
        read_class_names(tmp_path / "l.csv", {"0", "1"}, exactly=True)

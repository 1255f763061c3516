"""The order of classes in a row."""

import numpy as np
import pytest
from serve_model import CLASS_NAMES

from serve.outputs.layout import Layout


def test_of_equal_probabilities_the_first_class_is_the_likeliest_whatever_k() -> None:
    even = np.full(300, 1 / 300, np.float32)
    names = tuple(map(str, range(300)))
    assert Layout(names).likeliest(even) == Layout(names, 1).likeliest(even) == [0]
    assert Layout(names, 5).likeliest(even) == [0, 1, 2, 3, 4]


def test_more_classes_than_there_are_cannot_be_likeliest() -> None:
    for k in (-1, 4):
        with pytest.raises(ValueError, match=rf"--top-k {k} .* 3 "):
            Layout(CLASS_NAMES, k)


def test_a_file_of_gigabytes_of_probabilities_is_warned_of() -> None:
    many = tuple(f"class {i}" for i in range(10_000))
    assert "--top-k" in Layout(many).warn_of_size(100_000)
    assert "13 GB" in Layout(many).warn_of_size(100_000)
    assert Layout(many, top_k=5).warn_of_size(100_000) == ""
    assert Layout(("cat", "dog")).warn_of_size(10_000_000) == ""

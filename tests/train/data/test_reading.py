"""A file is read again before it is given up, a bounded number of times."""

from pathlib import Path
from typing import Any

import pytest
from train_data import draw

from train.data import reading
from train.data.reading import read_image


@pytest.mark.parametrize("failures", [1, 3])
def test_a_bad_moment_of_the_file_system_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    path, attempts, read = draw(tmp_path / "a.png"), [], reading.read_image_file
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0, 0.0))

    def flaky(name: Any) -> bytes:
        attempts.append(name)
        if len(attempts) <= failures:
            raise OSError(5, "Input/output error")
        return read(name)

    monkeypatch.setattr(reading, "read_image_file", flaky)
    assert read_image(path).size == (24, 20)
    assert len(attempts) == failures + 1


@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_a_file_that_stays_bad_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0, 0.0))
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        read_image(tmp_path / "a.png")

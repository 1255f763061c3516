"""A lock is taken, held by another, or not to be had."""

import errno
import fcntl
from pathlib import Path
from typing import Any

import pytest

from train.locks import NoLocks, take


def test_a_lock_that_another_has_is_held(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "a") as mine, open(tmp_path / "lock", "a") as other:
        assert take(fcntl.flock, mine)
        assert not take(fcntl.flock, other)
        fcntl.flock(mine, fcntl.LOCK_UN)
        assert take(fcntl.flock, other, wait=True)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_what_is_lost(number: int, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, "no")

    with open(tmp_path / "lock", "a") as file, pytest.raises(NoLocks) as refused:
        take(refuse, file)
    said: list[str] = []
    for _ in range(2):
        refused.value.warn(said.append, tmp_path, "all is lost")
    (warning,) = said
    assert str(tmp_path) in warning
    assert "all is lost" in warning

"""A file lock is held, held by another process, or not to be had."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from serve.contract.locks import file_lock, is_locked


@contextmanager
def held_elsewhere(path: Path, inherited: bool) -> Iterator[None]:
    context = get_context("fork")
    locked, done = context.Event(), context.Event()

    def hold() -> None:
        with file_lock(path, "", print, inherited=inherited):
            locked.set()
            done.wait(30)

    process = context.Process(target=hold)
    process.start()
    assert locked.wait(30)
    yield
    done.set()
    process.join()


@pytest.mark.parametrize("inherited", [False, True])
def test_a_lock_that_another_process_has_is_waited_for_and_named(inherited: bool, tmp_path: Path) -> None:
    path, said = tmp_path / "lock", list[str]()
    with held_elsewhere(path, inherited):
        with (
            pytest.raises(ValueError, match=str(tmp_path)),
            file_lock(path, "", said.append, seconds=0.01, inherited=inherited),
        ):
            pytest.fail("two processes have the lock")
        assert is_locked(path) != inherited
    assert len(said) == 1
    with file_lock(path, "", said.append, seconds=0, inherited=inherited) as file:
        assert file is not None
    assert not is_locked(path)
    assert not is_locked(tmp_path / "none")


@pytest.mark.parametrize("inherited", [False, True])
def test_only_an_inherited_lock_lives_on_in_a_child(inherited: bool, tmp_path: Path) -> None:
    """A loader process may outlive its trainer, which must not keep the next one out."""
    context = get_context("fork")
    done = context.Event()
    with file_lock(tmp_path / "lock", "", print, inherited=inherited):
        child = context.Process(target=done.wait, args=(30,))
        child.start()
    try:
        free = file_lock(tmp_path / "lock", "", lambda _: None, seconds=0, inherited=inherited)
        if inherited:
            with pytest.raises(ValueError, match=str(tmp_path)), free:
                pass
        else:
            with free as file:
                assert file is not None
    finally:
        done.set()
        child.join()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_once_with_the_risk(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", refuse)
    said: list[str] = []
    for _ in range(2):
        with file_lock(tmp_path / "lock", "all is lost", said.append) as file:
            assert file is None
    (warning,) = said
    assert str(tmp_path) in warning
    assert "all is lost" in warning

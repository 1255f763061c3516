"""A run directory in an object store: a copy here, whose export folder is copied back."""

import io
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import TextIO

from serve.contract.errors import UserError
from serve.contract.locks import file_lock
from serve.staging import named
from serve.storage import check_bucket, get_file, is_remote, list_objects, put_file, remove

PROBE = ".writable"
LOCK = ".export.lock"
SNAPSHOTS = "checkpoints/epoch-"  # not needed here


@contextmanager
def open_run(run: str, writes: bool = True) -> Iterator[Path]:
    """The run directory; of one in an object store a copy, from which export/ is published at the end.

    What is printed and raised meanwhile names the run, not its copy. With `writes`, a store that takes no
    files is an error at once.

    Of one here, other exports wait. What is no longer in export/ goes first, and the record of verification
    comes before the models: a model that is there is one that was verified.
    """
    if not is_remote(run):
        with _alone(Path(run)):
            yield Path(run)
        return
    url = run.rstrip("/")
    check_bucket(url)
    if writes:
        _check_writable(f"{url}/export")
    with tempfile.TemporaryDirectory(prefix="purebred-") as temporary:
        folder = Path(temporary) / url.rpartition("/")[2]
        names = list(list_objects(url))
        if not names:
            raise UserError(f"--run {run}: there is nothing")
        for name in names:
            if any(part in ("", ".", "..") for part in name.split("/")):
                raise UserError(f"the object {url}/{name} cannot be a file below a folder: rename it")
        for name in names:
            if not name.startswith(SNAPSHOTS):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                get_file(f"{url}/{name}", folder / name)
        before = {path: path.stat().st_mtime_ns for path in _files(folder)}
        try:
            with _renaming(folder, url):
                yield folder
        finally:
            after = _files(folder)
            for path in before.keys() - set(after):
                remove(f"{url}/{path.relative_to(folder).as_posix()}")
            for path in sorted(after, key=lambda path: (path.suffix == ".onnx", path)):
                if before.get(path) != path.stat().st_mtime_ns:
                    put_file(path, f"{url}/{path.relative_to(folder).as_posix()}")


def _check_writable(url: str) -> None:
    """Raises UserError when no file can be put there."""
    with tempfile.NamedTemporaryFile() as empty:
        try:
            put_file(Path(empty.name), f"{url}/{PROBE}")
        except PermissionError as error:
            raise UserError(f"{url} cannot be written: {error}") from error
    with suppress(PermissionError):
        remove(f"{url}/{PROBE}")


@contextmanager
def _renaming(folder: Path, url: str) -> Iterator[None]:
    out, err = (_Renaming(stream, str(folder), url) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err), named(folder, url):
        yield


class _Renaming(io.TextIOBase):
    def __init__(self, stream: TextIO, name: str, instead: str):
        self.stream, self.name, self.instead = stream, name, instead

    def write(self, text: str) -> int:
        self.stream.write(text.replace(self.name, self.instead))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Let one command at a time make or record model files; a run that cannot be written needs no lock."""
    risk = "two exports of this run at once are not noticed, and replace each other's files"
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(file_lock(run / LOCK, risk, partial(print, file=sys.stderr, flush=True)))
        yield


def _files(folder: Path) -> list[Path]:
    return [path for path in (folder / "export").rglob("*") if path.is_file()]

"""A run directory at a URL: a local copy, whose export folder is copied back."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from serve import storage
from serve.contract.errors import UserError
from serve.contract.locks import file_lock
from serve.contract.urls import is_remote
from serve.local_copy import temporary_copy

LOCK = ".export.lock"
SNAPSHOTS = "checkpoints/epoch-"  # not needed for an export
RISK = "two exports of this run at once are not noticed, and replace each other's files"


@contextmanager
def open_run_folder(run: str, writes: bool = True) -> Iterator[Path]:
    """Yield the run directory; of a remote one a copy, from which export/ is published at the end.

    With `writes`, a store that takes no files is an error at once. Exports of a local run wait for each
    other. What is no longer in export/ goes first, and the record of verification comes before the models:
    a model at the URL is one that was verified.
    """
    if not is_remote(run):
        with ExitStack() as stack:
            with suppress(OSError):  # nothing is exported into a run that cannot be written
                notify = partial(print, file=sys.stderr, flush=True)
                stack.enter_context(file_lock(Path(run) / LOCK, RISK, notify))
            yield Path(run)
        return
    url = run.rstrip("/")
    if writes:
        storage.check_store_writable(f"{url}/export")
    with temporary_copy(url, url.rpartition("/")[2]) as copy:
        files = [file for file in storage.list_files(url) if not file.name.startswith(SNAPSHOTS)]
        if not files:
            raise UserError(f"--run {run} has no files below it: check the URL")
        storage.get_files(files, copy.folder)
        before = {path: path.stat().st_mtime_ns for path in _files(copy.folder)}
        try:
            yield copy.folder
        finally:
            after = _files(copy.folder)
            for path in before.keys() - set(after):
                storage.remove(copy.url_of(path))
            for path in sorted(after, key=lambda path: (path.suffix == ".onnx", path)):
                if before.get(path) != path.stat().st_mtime_ns:
                    copy.publish(path)


def _files(folder: Path) -> list[Path]:
    return [path for path in (folder / "export").rglob("*") if path.is_file()]

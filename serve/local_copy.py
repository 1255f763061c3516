"""Models and folders at URLs, as local copies for as long as they are needed.

A file that is published appears at its URL whole or not at all, so that what holds for files on a disk
holds for objects: a part has its manifest only when it is whole.
"""

import io
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

from serve import storage
from serve.contract.urls import is_remote, redact


@dataclass(frozen=True)
class LocalCopy:
    """A local folder whose files are copies of those at `url`; without a URL, the folder itself."""

    folder: Path
    url: str = ""

    def url_of(self, path: Path) -> str:
        """Return the URL of a local file or folder; without a URL, its path."""
        if not self.url:
            return str(path)
        return f"{self.url}/{path.relative_to(self.folder).as_posix()}".removesuffix("/.")

    def files(self, folder: Path) -> Iterable[storage.RemoteFile]:
        """Return those at the URL of a local folder, without those of its folders."""
        return [file for file in storage.list_files(self.url_of(folder)) if "/" not in file.name]

    def open(self, path: Path) -> IO[bytes]:
        """Open the file at the URL, or the local one."""
        if not self.url:
            return path.open("rb")
        return storage.open_seekable(self.url_of(path))

    def fetch(self, *paths: Path) -> None:
        """Copy those of the files that exist at the URL, in place of local ones."""
        for path in paths if self.url else ():
            path.unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                storage.get_file(self.url_of(path), path)

    def fetch_folder(self, folder: Path) -> None:
        if self.url:
            storage.get_files(self.files(folder), folder)

    def publish(self, *paths: Path) -> None:
        """Copy files to the URL, in this order. Raises OSError; what was published before stays."""
        for path in paths if self.url else ():
            storage.put_file(path, self.url_of(path))

    def remove_folder(self, folder: Path) -> None:
        for file in self.files(folder) if self.url else ():
            storage.remove(file.url)


@contextmanager
def temporary_copy(url: str, name: str = "") -> Iterator[LocalCopy]:
    """Yield a local path for a remote file or folder, whose URL messages and errors name instead."""
    with tempfile.TemporaryDirectory(prefix="purebred-") as temporary:
        copy = LocalCopy(Path(temporary).resolve() / name, url)
        replace = copy.folder.as_posix(), redact(url)
        out, err = (_Replacing(stream, *replace) for stream in (sys.stdout, sys.stderr))
        with redirect_stdout(out), redirect_stderr(err):
            try:
                yield copy
            except (ValueError, OSError) as error:
                error.args = tuple(p.replace(*replace) if isinstance(p, str) else p for p in error.args)
                if isinstance(error, OSError) and isinstance(error.filename, str):
                    error.filename = error.filename.replace(*replace)
                raise


class _Replacing(io.TextIOBase):
    def __init__(self, stream: TextIO, name: str, instead: str):
        self.stream, self.name, self.instead = stream, name, instead

    def write(self, text: str) -> int:
        self.stream.write(text.replace(self.name, self.instead))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def open_model(model: str) -> Iterator[Path]:
    """Yield the model's file, or a copy of it and of the record of verification beside it."""
    if not is_remote(model):
        yield Path(model)
        return
    from serve.verification import RECORD  # with Pillow, which merging does without

    with temporary_copy(model, "model.onnx") as copy:  # a signed URL may be longer than a file's name
        storage.get_file(model, copy.folder)
        if "?" not in model:  # a signed URL is of one object
            with suppress(OSError, ValueError):  # without it, the file is served with what it says itself
                storage.get_file(f"{model.rpartition('/')[0]}/{RECORD}", copy.folder.with_name(RECORD))
        yield copy.folder


@contextmanager
def open_folder(folder: str) -> Iterator[Path]:
    """Yield the folder, or a copy of the files in it."""
    if not is_remote(folder):
        yield Path(folder)
        return
    with temporary_copy(folder.rstrip("/")) as copy:
        copy.fetch_folder(copy.folder)
        yield copy.folder

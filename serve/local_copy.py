"""Models and folders at URLs, as local copies for as long as they are needed.

A file that is published appears at its URL whole or not at all, so that what holds for files on a disk
holds for objects: a part has its manifest only when it is whole.
"""

import io
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TextIO

from serve import storage
from serve.contract.command_line import command
from serve.contract.errors import UserError
from serve.contract.urls import is_http, is_remote, redact
from serve.mlflow_models import (
    MODEL_FILE,
    fetch_model_file,
    find_model,
    is_mlflow_model,
    local_location,
    model_files,
    model_server,
    onnx_file,
)

EXPORTED = f"export/{MODEL_FILE}"  # in a run directory


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
        """Replace local files by those at the URL; one that is not there is removed."""
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

    def fileno(self) -> int:
        return self.stream.fileno()


@dataclass(frozen=True)
class OpenedModel:
    """A model's local file, and what its name stood for when it was opened."""

    path: Path
    location: str
    """Path or URL of the file, or its name in MLflow that no alias moves."""
    version: str = ""
    """Registered one in MLflow, as in pets/3."""
    run_id: str = ""
    """MLflow run that logged it, where the name tells."""

    def described(self, given: str) -> str:
        """Return the name as it was given, with what it stood for where that is another one."""
        return given if given == self.location else f"{given} ({self.location})"


@contextmanager
def resolve_model(model: str) -> Iterator[OpenedModel]:
    """Yield the model's file, or a copy of it and of the record of verification beside it.

    `model` is a file, a run directory, a URL of either, or a model of MLflow (serve/mlflow_models.py).

    Raises:
        UserError: there is no such model; the message names the command that exports a run.
        OSError: it cannot be read now.
    """
    model = os.path.expanduser(model)
    if is_mlflow_model(model):
        with _open_logged_model(model) as opened:
            yield opened
    elif is_remote(model):
        with temporary_copy(model, MODEL_FILE) as copy:  # a signed URL may be longer than a file's name
            yield OpenedModel(copy.folder, _fetch_model(model, copy.folder))
    else:
        file = _file_in_folder(Path(model)) if os.path.isdir(model) else Path(model)
        yield OpenedModel(file, str(file))


def _fetch_model(url: str, path: Path) -> str:
    """Copy a model, or that of a run directory, and return its URL."""
    from serve.verification import RECORD  # with Pillow, which merging does without

    try:
        storage.get_file(url, path)
    except FileNotFoundError:
        if is_http(url):
            raise
        exported = f"{url.rstrip('/')}/{EXPORTED}"
        try:
            storage.get_file(exported, path)
        except FileNotFoundError as error:
            raise UserError(
                f"there is no model at {redact(url)}, nor at {redact(exported)}: of a run directory, "
                f"{command('export/main.py')} --run {redact(url)} makes it"
            ) from error
        url = exported
    if "?" not in url:  # a signed URL is of one object
        with suppress(OSError, ValueError):  # without it, the file is served with what it says itself
            storage.get_file(f"{url.rpartition('/')[0]}/{RECORD}", path.with_name(RECORD))
    return url


def _file_in_folder(folder: Path) -> Path:
    """Return the model of a run directory, or the only one of another folder."""
    if (exported := folder / EXPORTED).is_file():
        return exported
    if (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir():
        raise UserError(
            f"{folder} has no {EXPORTED}; make it with {command('export/main.py')} --run {folder}"
        )
    if (folder / MODEL_FILE).is_file():
        return folder / MODEL_FILE
    raise UserError(
        f"{folder} is a folder without {EXPORTED}: give an ONNX file, or the run directory that "
        "train/main.py wrote"
    )


@contextmanager
def _open_logged_model(name: str) -> Iterator[OpenedModel]:
    from serve.verification import RECORD

    server = model_server(name)
    found = find_model(server, name)
    opened = OpenedModel(Path(), found.name or name, found.version, found.run_id)
    local = local_location(found.location)
    if local is not None:
        if not local.exists():
            raise UserError(
                f"{name} is in {local}, which this machine does not have. A server with "
                "--artifacts-destination gives its files to all machines; else give the model's file"
            )
        if local.is_dir():
            local /= onnx_file((file.name for file in local.iterdir()), name)
        yield replace(opened, path=local)
        return
    with temporary_copy(opened.location, MODEL_FILE) as copy:
        if found.location.endswith(".onnx"):
            files, chosen = {}, found.location
            files[RECORD] = f"{found.location.rpartition('/')[0]}/{RECORD}"
        else:
            files = model_files(server, found.location)
            chosen = files[onnx_file(files, name)]
        fetch_model_file(server, chosen, copy.folder)
        if RECORD in files:
            with suppress(OSError, ValueError):
                fetch_model_file(server, files[RECORD], copy.folder.with_name(RECORD))
        yield replace(opened, path=copy.folder)


@contextmanager
def open_folder(folder: str) -> Iterator[Path]:
    """Yield the folder, or a copy of the files in it."""
    if not is_remote(folder):
        yield Path(folder)
        return
    with temporary_copy(folder.rstrip("/")) as copy:
        copy.fetch_folder(copy.folder)
        yield copy.folder

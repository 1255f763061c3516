"""Models and outputs in object stores: files of a folder here, each a copy of an object there.

A file that is published appears there whole or not at all, so that what holds for files on a disk holds for
objects: a part has its manifest only when it is whole.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import ModuleType

from serve.contract.errors import UserError
from serve.contract.files import check_writable
from serve.outputs.formats import is_predictions
from serve.shards import Shard, is_manifest, manifest_path


@dataclass(frozen=True)
class Staging:
    """`folder` stands for `url`, which names a folder; without a URL it is the place itself."""

    folder: Path
    url: str = ""

    def bring(self, *paths: Path) -> None:
        """Those of the files that are there, replacing what is here."""
        for path in paths if self.url else ():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            try:
                _remote().get_file(self._url_of(path), path)
            except FileNotFoundError:
                continue

    def bring_folder(self, folder: Path) -> None:
        """All files of a folder, those of its folders not."""
        if self.url:
            names = _remote().list_objects(self._url_of(folder))
            self.bring(*(folder / name for name in names if "/" not in name and name.strip(".")))

    def publish(self, *paths: Path) -> None:
        """In this order. Raises OSError; what was published before stays."""
        for path in paths if self.url else ():
            _remote().put_file(path, self._url_of(path))

    def check_replaceable(self, path: Path, overwrite: bool, keep_manifest: bool = False) -> None:
        """Raises UserError when an output at `path`, or its manifest, would replace another kind of file.

        An object that may be written and not read cannot be examined.
        """
        tests = {path: is_predictions} | ({manifest_path(path): is_manifest} if keep_manifest else {})
        for file, test in {} if overwrite else tests.items():
            name = self._url_of(file) if self.url else str(file)
            try:
                remote = BufferedReader(_remote().open_seekable(name)) if self.url else None
                with remote or file.open("rb") as opened:  # fsspec's own readline has no limit
                    if test(opened):
                        continue
            except FileNotFoundError:
                continue
            except (PermissionError, IsADirectoryError):
                if self.url:
                    continue
            raise UserError(
                f"--output: {name} exists, and this command did not write it: choose another name, or give "
                "--overwrite to replace it"
            )

    def remove_folder(self, folder: Path) -> None:
        if self.url:
            _remote().remove_folder(self._url_of(folder))

    def _url_of(self, path: Path) -> str:
        return f"{self.url}/{path.relative_to(self.folder).as_posix()}".removesuffix("/.")


@contextmanager
def named(copy: Path, url: str) -> Iterator[None]:
    """Let errors name the object or folder in the store: its copy is gone when they are read."""

    def renamed(value: object) -> object:
        return value.replace(str(copy), url) if isinstance(value, str) else value

    try:
        yield
    except (ValueError, OSError) as error:
        error.args = tuple(renamed(part) for part in error.args)
        if isinstance(error, OSError) and error.filename is not None:  # set to None, it would be printed
            error.filename = renamed(error.filename)
        raise


@contextmanager
def open_model(model: str) -> Iterator[Path]:
    """The model's file, or a copy of the object that it names for as long as it is needed."""
    if not _is_url(model):
        yield Path(model)
        return
    with tempfile.TemporaryDirectory(prefix="purebred-") as folder:
        from serve.verification import RECORD  # it imports Pillow, too

        path = Path(folder) / "model.onnx"
        _remote().get_file(model, path)
        if "?" not in model:  # a signed address is of one object
            with suppress(OSError, ValueError):  # without it, the file is served with what it says itself
                _remote().get_file(f"{model.rpartition('/')[0]}/{RECORD}", path.with_name(RECORD))
        with named(path, model):
            yield path


@contextmanager
def open_folder(folder: str) -> Iterator[Path]:
    """The folder, or a copy of the objects in it for as long as it is needed."""
    if not _is_url(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="purebred-") as here:
        Staging(Path(here), folder.rstrip("/")).bring_folder(Path(here))
        with named(Path(here), folder.rstrip("/")):
            yield Path(here)


@contextmanager
def open_output(output: str, suffix: str, shard: Shard | None) -> Iterator[tuple[Path, Staging]]:
    """The file to write, with a shard a part in the folder `output`; and where it is published.

    Raises UserError and FileNotFoundError for what cannot be written, before anything is scored.
    """
    output = output or ("predictions" if shard else f"predictions{suffix}")
    if not _is_url(output):
        path = _local_output(Path(output), suffix, shard)
        yield path, Staging(path.parent)
        return
    folder, name = (output.rstrip("/"), shard.part_name(suffix)) if shard else _split(output)
    _remote().check_bucket(folder)
    with tempfile.TemporaryDirectory(prefix="purebred-") as here, named(Path(here).resolve(), folder):
        yield Path(here).resolve() / name, Staging(Path(here).resolve(), folder)


def _remote() -> ModuleType:
    """On first use: it imports Pillow, which merging does without."""
    from serve import storage as remote

    return remote


def _is_url(name: str) -> bool:
    return "://" in name


def _local_output(path: Path, suffix: str, shard: Shard | None) -> Path:
    if not path.absolute().parent.is_dir():
        raise UserError(f"the folder of --output {str(path)!r} does not exist; make it first")
    # a link is written through, as of a redirected standard output
    folder = path if shard and path.is_dir() else Path(os.path.realpath(path)).parent
    if shard:
        if path.exists() and not path.is_dir():
            raise UserError(f"--output {str(path)!r} is not a folder; --shard writes part files into one")
    elif path.exists() and not path.is_file():  # replaced at the end, so found out too late
        raise UserError(f"--output {str(path)!r} is not a regular file")
    check_writable(folder, "--output")
    return path / shard.part_name(suffix) if shard else path


def _split(url: str) -> tuple[str, str]:
    """(folder, name)"""
    folder, _, name = url.rpartition("/")
    if folder.endswith("/") or name in ("", ".", ".."):
        raise UserError(f"--output {url} names no object in a bucket, such as s3://bucket/predictions.csv")
    return folder, name

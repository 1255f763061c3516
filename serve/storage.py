"""Files at URLs of every scheme that fsspec knows: s3://, gs://, az://, https://, file:// and others.

Calls are repeated a bounded number of times. fsspec and its file systems are imported on first use only.
"""

import errno
import io
import random
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from serve.contract.errors import UserError
from serve.contract.files import MAY_PASS, atomic_path
from serve.contract.installation import how_to_install
from serve.contract.urls import is_http, redact, url_path

EXTRAS = {"s3": "cloud", "http": "cloud", "https": "cloud", "gs": "gcs", "gcs": "gcs"}
ATTEMPTS = 4
FIRST_PAUSE = 0.5  # seconds; doubled after each attempt, and half of it drawn by chance
THREADS = 32  # they wait for the network
S3_VERSION = "?versionId="
READ_AHEAD = 1 << 20  # bytes fetched at once while listing a tar file
CONNECT_SECONDS, SILENT_SECONDS = 30.0, 60.0  # of an HTTP server that does not answer, or stops sending
PROBE = ".writable"
FILE_SYSTEMS = ("file://", "local://", "sftp://", "ssh://")  # write in place, and rename atomically
# What stores know of an object's content
CHECKSUMS = ("ETag", "etag", "Content-MD5", "Digest", "blob_id")
TIMES = (
    "mtime",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "updated",
    "modified",
    "modificationTime",
    "modify",
    "last_write_time",
)

T = TypeVar("T")


class OutageError(OSError):
    """The store does not answer, or not as it should; it may later."""


def is_outage(error: Exception) -> bool:
    """Return whether a later call may read, from a store or a disk, what could not be read now."""
    return isinstance(error, OutageError) or (isinstance(error, OSError) and error.errno in MAY_PASS)


class RemoteFile(NamedTuple):
    url: str
    name: str
    """Below the folder that was listed; of a single file, its last part."""
    size: int | None
    version: str
    """Another one when the content is another; "" where the store has none."""

    @property
    def stamp(self) -> str:
        return f"{self.size}:{self.version}" if self.version else ""


def filesystem(url: str) -> Any:
    """Return fsspec's file system for a URL; UserError when its scheme is unknown or not installed."""
    scheme, _, path = url.partition("://")
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in ("file", "local"):
        options = {"auto_mkdir": True}
    elif scheme in ("sftp", "ssh"):
        options = {}
    try:
        from fsspec.core import url_to_fs

        if is_http(url):
            options["client_kwargs"] = _client_options(scheme)
        # of the rest of a URL, it would take :: for a chain of file systems
        return url_to_fs(f"{scheme}://{path.partition('/')[0]}", **options)[0]
    except ImportError as error:
        install = f": {how_to_install(EXTRAS[scheme])}" if scheme in EXTRAS else ""
        raise UserError(f"{scheme}:// needs a package that is not installed ({error}){install}") from error
    except (TypeError, ValueError) as error:  # it may need more than a URL
        raise UserError(f"{redact(url)}: {error}") from error


def _client_options(scheme: str) -> dict[str, Any]:
    """Return aiohttp's options: those of the user's fsspec configuration, and timeouts of silence alone.

    Its default ends every download after five minutes.
    """
    import aiohttp
    from fsspec import get_filesystem_class
    from fsspec.config import apply_config

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
    return {"timeout": timeout, **apply_config(get_filesystem_class(scheme), {}).get("client_kwargs", {})}


def retried(url: str, action: Callable[[], T]) -> T:
    """Return what the action on an object returns.

    Raises:
        FileNotFoundError, PermissionError, UserError: at once. OSError: after the last attempt; OutageError
            if a later one may succeed.
    """
    pause = FIRST_PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except FileNotFoundError as error:  # fsspec's names no more than the path
            raise FileNotFoundError(f"{redact(url)}: {error}") from error
        except PermissionError as error:
            raise PermissionError(f"{redact(url)}: {error}") from error
        except UserError:
            raise
        except ValueError as error:  # a port that is no number, a pattern that a file system does not take
            raise UserError(_describe(url, error)) from error
        except Exception as error:  # aiohttp's, botocore's and google's exceptions share no base
            if attempt == ATTEMPTS or not _may_pass(error):
                kind = OutageError if _may_pass(error) else OSError
                raise kind(f"{_describe(url, error)} (attempt {attempt})") from error
        time.sleep(pause * random.uniform(0.5, 1))
        pause *= 2
    raise AssertionError("unreachable")


def _describe(url: str, error: Exception) -> str:
    """Return the error with the URL in it, once."""
    message = redact(error) or type(error).__name__
    return message if redact(url) in message else f"{redact(url)}: {message}"


def _may_pass(error: Exception) -> bool:
    """A client error (401, 403, 410, ...) will be the same next time; 408 and 429 ask for patience."""
    status = getattr(error, "status", 0) or getattr(error, "code", 0)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 429)
    lasting = ("NoCredentialsError", "ParamValidationError", "InvalidURL", "IsADirectoryError")
    return type(error).__name__ not in lasting


def _call(method: str, url: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of the URL's file system, which gets the URL unless there are other arguments."""
    return retried(url, lambda: getattr(filesystem(url), method)(*(arguments or (url,)), **options))


def read_object(url: str) -> bytes:
    """Raises UserError when it is empty or above MAX_FILE_BYTES, OSError when it cannot be read."""
    from serve.contract.images import MAX_FILE_BYTES, check_file_size  # Pillow, which merging does without

    data = read_range(url, 0, MAX_FILE_BYTES + 1)
    check_file_size(len(data))
    return data


def read_range(url: str, start: int, size: int) -> bytes:
    """Return `size` bytes from `start` on, or fewer where the object ends."""
    return retried(url, lambda: _read_http(url, start, size) if is_http(url) else _read(url, start, size))


def _read(url: str, start: int, size: int) -> bytes:
    if url.startswith("s3") and S3_VERSION in url:  # s3fs would take what is before it for the key
        raise UserError(f"a key with {S3_VERSION!r} cannot be read: rename it")
    try:
        data: bytes = filesystem(url).cat_file(url, start=start, end=start + size)
    except OSError as error:
        if start == 0 and error.errno == errno.EINVAL:  # S3's answer for an empty object
            return b""
        raise
    return data


def _read_http(url: str, start: int, size: int) -> bytes:
    """Read a stream, so that a server that sends more than was asked for cannot fill the memory."""
    ranged = {"headers": {"Range": f"bytes={start}-{start + size - 1}"}} if start else {}
    # a size saves the question for it
    with filesystem(url).open(url, "rb", block_size=0, size=1, **ranged) as stream:
        if start and stream.r.status != 206:
            raise UserError(f"{redact(url)}: this server reads no ranges of a file; download it first")
        parts, left = [], size
        while left > 0 and (part := stream.read(left)):
            parts.append(part)
            left -= len(part)
    return b"".join(parts)


def open_seekable(url: str) -> IO[bytes]:
    """Open a big object of which little is read: seeking does not download what lies between."""
    if is_http(url):
        read_range(url, 1, 1)
    file = _call("open", url, url, "rb", block_size=READ_AHEAD, cache_type="readahead")
    return io.BufferedReader(_Retried(url, file))


class _Retried(io.RawIOBase):
    """An open object whose reads are tried again, each from where it began."""

    def __init__(self, url: str, file: Any):
        self.url, self.file = url, file
        self.name = redact(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.file.seek(offset, whence)  # of SFTP, it returns nothing
        return self.tell()

    def tell(self) -> int:
        return int(self.file.tell())

    def readinto(self, buffer: Any) -> int:
        start = self.tell()

        def read() -> int:
            self.file.seek(start)
            return int(self.file.readinto(buffer))

        return retried(self.url, read)

    def close(self) -> None:
        self.file.close()
        super().close()


def download(url: str) -> IO[bytes]:
    """Return an open copy of an object of any length, which has no name any more."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "copy"
        get_file(url, path)
        return path.open("rb")


def get_file(url: str, path: Path, size: int | None = None) -> None:
    """Copy an object, of a size that may be known, to a file, which appears whole or not at all."""

    def copy() -> None:
        filesystem(url).get_file(url, str(temporary))
        if temporary.is_dir():  # a local file system's copy of a folder
            temporary.rmdir()
            raise FileNotFoundError("it is a folder")
        if size not in (None, arrived := temporary.stat().st_size):
            raise OSError(f"{redact(url)}: {arrived} bytes arrived of {size}")

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        retried(url, copy)


def get_files(files: Iterable[RemoteFile], folder: Path) -> None:
    """Copy listed files to their names in a local folder, several at a time.

    Raises:
        UserError: a name that is no file's below the folder. OSError: a file cannot be copied.
    """
    files = list(files)
    for file in files:
        if any(part in ("", ".", "..") for part in file.name.split("/")):
            raise UserError(f"the object {redact(file.url)} cannot be a file below a folder: rename it")
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda file: get_file(file.url, folder / file.name, file.size), files):
            pass


def list_files(url: str) -> Iterator[RemoteFile]:
    """Yield the files below a folder, in no particular order, or the one file that the URL names."""
    if is_http(url):
        if not url_path(url).endswith(".tar"):
            raise UserError(f"{redact(url)}: HTTP has no folders; give a text file of URLs, or tar files")
        yield stat(url)
        return
    url = url.rstrip("/")
    root = _call("_strip_protocol", url).rstrip("/")
    listed: Iterable[tuple[str, dict[str, Any]]] = ()
    if url.startswith("s3"):
        listed = _list_s3(url, root)
    else:
        try:
            listed = _call("find", url, root, detail=True, on_error="raise").items()
        except FileNotFoundError as error:
            if _call("exists", url):  # a folder in it is gone: what is left was not listed
                raise OutageError(f"{redact(url)} changed while it was listed: {error}") from error
    for path, info in listed:
        if path == root:
            yield _remote_file(url, info)
        elif not path.endswith("/"):  # which stands for a folder
            name = path.removeprefix(f"{root}/")
            yield _remote_file(f"{url}/{name}", info, name)


def _list_s3(url: str, root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """List page by page: s3fs would hold a dictionary for each object."""
    bucket, _, folder = root.partition("/")
    arguments = {"Bucket": bucket, "Prefix": f"{folder}/" if folder else ""}
    page: dict[str, Any] = {"IsTruncated": True}
    while page.get("IsTruncated"):
        page = _call("call_s3", url, "list_objects_v2", **arguments)
        for item in page.get("Contents", ()):
            yield f"{bucket}/{item['Key']}", item
        arguments["ContinuationToken"] = page.get("NextContinuationToken", "")
    if not page.get("Contents"):  # not a folder
        with suppress(FileNotFoundError):
            yield root, _info(url)


def stat(url: str) -> RemoteFile:
    """Raises FileNotFoundError when no file is there."""
    return _remote_file(url, _info(url))


def _info(url: str) -> dict[str, Any]:
    info: dict[str, Any] = _call("info", url)
    if info.get("type") == "directory":
        raise FileNotFoundError(f"{redact(url)} is a folder")
    return info


def _remote_file(url: str, info: dict[str, Any], name: str = "") -> RemoteFile:
    version = next(filter(None, map(info.get, CHECKSUMS + TIMES)), "")
    name = name or url_path(url).rpartition("/")[2]
    return RemoteFile(url, name, info.get("size", info.get("Size")), str(version))


def match(pattern: str) -> tuple[list[str], int]:
    """Return the URLs of the files that a pattern with * ? [ ] matches, and how many folders it does."""
    base = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0] + "/"
    root = _call("_strip_protocol", pattern, base)
    try:
        found = _call("glob", pattern, detail=True)
    except UserError as error:
        raise UserError(f"{error}; as in **/*.jpg") from error
    files = [name for name, info in found.items() if info.get("type") != "directory"]
    return [base + name.removeprefix(root).lstrip("/") for name in files], len(found) - len(files)


def exists(url: str) -> bool:
    """Return whether a URL that looks like a pattern is the name of a file or folder."""
    with suppress(FileNotFoundError):
        stat(url)
        return True
    return next(iter(list_files(url)), None) is not None


def put_file(path: Path, url: str) -> None:
    """Copy a file to an object, which appears whole or not at all: object stores see to that."""
    if not url.startswith(FILE_SYSTEMS):
        _call("put_file", url, str(path), url)
        return
    folder, _, name = url.rpartition("/")
    temporary = f"{folder}/.{name[:50]}.{secrets.token_hex(8)}.tmp"
    try:
        _call("put_file", url, str(path), temporary)
        _call("mv", url, temporary, url)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise


def copy_object(source: str, target: str) -> None:
    """Copy an object inside its store."""
    _call("cp_file", source, source, target)


def remove(url: str) -> None:
    """Remove an object; another process may have done so."""
    with suppress(FileNotFoundError):
        _call("rm_file", url)


def check_store_writable(url: str) -> None:
    """Write an empty object below a folder and remove it. Raises UserError when that is not allowed."""
    if is_http(url):
        raise UserError(f"{redact(url)}: HTTP servers take no files; give a folder, s3:// or gs://")
    try:
        _call("pipe_file", f"{url}/{PROBE}", f"{url}/{PROBE}", b"")
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{redact(url)} cannot be written: {error}") from error
    with suppress(OSError):  # to remove it need not be allowed
        remove(f"{url}/{PROBE}")

"""Objects behind s3://, gs:// and https://, through fsspec (the extras cloud and gcs).

Reads are retried a bounded number of times. fsspec and its file systems are imported on first use only.
"""

import errno
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from serve.contract.errors import UserError
from serve.contract.files import atomic_path
from serve.contract.images import MAX_FILE_BYTES, ImageError
from serve.contract.installation import how_to_install

SCHEMES = ("s3://", "gs://", "gcs://", "https://", "http://")
ATTEMPTS = 4
FIRST_PAUSE = 0.5  # seconds; doubled after each attempt, and half of it drawn by chance
S3_VERSION = "?versionId="
READ_AHEAD = 1 << 20  # bytes fetched at once while listing a tar file

T = TypeVar("T")


class OutageError(OSError):
    """The store does not answer, or not as it should; it may later."""


class NoRangesError(OSError):
    """The server sends whole files only."""


def is_remote(name: str) -> bool:
    return name.startswith(SCHEMES)


def join_url(folder: str, name: str) -> str:
    """Also of ../name: object stores know no such folder. A doubled slash is part of a key."""
    scheme, _, path = folder.partition("://")
    parts: list[str] = []
    for part in f"{path}/{name.lstrip('/')}".split("/"):
        if part == "..":
            del parts[max(1, len(parts) - 1) :]
        elif part != ".":
            parts.append(part)
    return f"{scheme}://{'/'.join(parts)}"


def read_object(url: str) -> bytes:
    """Raises ImageError when it is empty or above MAX_FILE_BYTES, OSError when it cannot be read."""
    data = retried(lambda: _fetch(url, 0, MAX_FILE_BYTES + 1))
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"object is over the limit of {MAX_FILE_BYTES} bytes")
    if not data:
        raise ImageError("empty file (0 bytes)")
    return data


def read_range(url: str, start: int, size: int) -> bytes:
    return retried(lambda: _fetch(url, start, start + size))


def open_seekable(url: str) -> IO[bytes]:
    """For headers spread over a big object: seeking does not download what lies between."""
    if _is_http(url):
        retried(lambda: _fetch(url, 1, 2))
    file = retried(lambda: _filesystem(url).open(url, "rb", block_size=READ_AHEAD, cache_type="readahead"))
    opened: IO[bytes] = file
    return opened


def download(url: str) -> IO[bytes]:
    """A list of any length, as a temporary file."""

    def copy() -> IO[bytes]:
        file = tempfile.TemporaryFile(prefix="list-")  # noqa: SIM115  closed by the caller
        with _filesystem(url).open(url, "rb") as stream:
            shutil.copyfileobj(stream, file)
        file.seek(0)
        return file

    return retried(copy)


def get_file(url: str, path: Path) -> None:
    """Copy an object to a file, which appears whole or not at all. Raises FileNotFoundError, OSError."""
    try:
        with atomic_path(path) as temporary:
            retried(lambda: _filesystem(url).get_file(url, str(temporary)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url}: {error}") from error


def put_file(path: Path, url: str) -> None:
    """Copy a file to an object, which appears whole or not at all: object stores see to that."""
    retried(lambda: _filesystem(url).put_file(str(path), url))


def check_bucket(url: str) -> None:
    """Raises UserError or FileNotFoundError when nothing can be written below `url`, as far as can be told
    without writing."""
    if _is_http(url) or not is_remote(url):
        raise UserError(f"{url}: results are written to a folder, s3:// or gs://")
    if url.startswith("s3://"):
        bucket = url.removeprefix("s3://").partition("/")[0]
        with suppress(PermissionError):  # to list; to write may be allowed
            next(_s3_keys(_filesystem(url), bucket, ""), None)


def remove_folder(url: str) -> None:
    """All objects below a folder; none is no error."""
    try:
        names = list(list_objects(url))
    except FileNotFoundError:  # Google's answer
        return
    for name in names:
        remove(f"{url}/{name}")


def remove(url: str) -> None:
    retried(lambda: _filesystem(url).rm_file(url))


def list_objects(url: str) -> Iterator[str]:
    """Names below a folder, relative to it, in no particular order."""
    return (name for name, _ in list_stamped(url))


def list_stamped(url: str) -> Iterator[tuple[str, str]]:
    """(name below a folder, stamp), which is another when the object is; "" if the store has none."""
    if _is_http(url):
        raise UserError(f"{url}: HTTP cannot list a folder; give a text file of URLs, or tar files")
    filesystem = _filesystem(url)
    prefix = filesystem._strip_protocol(url).rstrip("/") + "/"
    if url.startswith("s3://"):
        bucket, _, key = prefix.partition("/")
        yield from (found for found in _s3_keys(filesystem, bucket, key) if not found[0].endswith("/"))
        return
    try:
        # by default, what cannot be listed would be left out without a word
        for folder, _, files in filesystem.walk(prefix.rstrip("/"), detail=True, on_error="raise"):
            yield from ((f"{folder}/{file}".removeprefix(prefix), _stamp(files[file])) for file in files)
    except (OSError, ValueError):
        raise
    except Exception as error:  # google's and aiohttp's own
        raise OSError(f"{url} cannot be listed: {error}") from error


def stamp(url: str) -> str:
    """Of one object, as `list_stamped` has it."""
    return retried(lambda: _stamp(_filesystem(url).info(url)))


def _stamp(info: dict[str, Any]) -> str:
    """Of what fsspec knows of an object."""
    fields = ("ETag", "etag", "Content-MD5", "Last-Modified", "LastModified", "updated", "mtime")
    known = next(filter(None, map(info.get, fields)), "")
    return f"{info.get('size')}:{known}" if known else ""


def _s3_keys(filesystem: Any, bucket: str, prefix: str) -> Iterator[tuple[str, str]]:
    """(key without the prefix, stamp), page by page: s3fs would hold a dictionary for each object."""
    position: dict[str, str] = {}
    while True:
        arguments = {"Bucket": bucket, "Prefix": prefix, **position}
        try:
            page = retried(lambda a=arguments: filesystem.call_s3("list_objects_v2", **a))  # type: ignore[misc]
        except (FileNotFoundError, PermissionError) as error:
            raise type(error)(f"s3://{bucket}/{prefix}: {error}") from error
        for item in page.get("Contents", ()):
            yield item["Key"].removeprefix(prefix), f"{item.get('Size')}:{item.get('ETag')}"
        if not page.get("IsTruncated"):
            return
        position = {"ContinuationToken": page["NextContinuationToken"]}


def match(pattern: str) -> list[str]:
    """URLs that a pattern with * ? [ ] stands for."""
    filesystem = _filesystem(pattern)
    found = retried(lambda: filesystem.glob(pattern))
    scheme = "" if _is_http(pattern) else pattern.partition("://")[0] + "://"
    return [scheme + name for name in found]


def retried(action: Callable[[], T]) -> T:
    """Raises OSError (or what the action says about the object itself) after the last attempt."""
    pause = FIRST_PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except FileNotFoundError as error:  # fsspec's says no more than the URL
            raise FileNotFoundError(f"not found: {error}") from error
        except (PermissionError, ValueError, ImportError, NoRangesError):
            raise
        except Exception as error:  # aiohttp's, botocore's and google's exceptions share no base
            if attempt == ATTEMPTS or not _may_pass(error):
                message = str(error) or type(error).__name__
                kind = OutageError if _may_pass(error) else OSError
                raise kind(f"{message} (attempt {attempt})") from error
        time.sleep(pause * random.uniform(0.5, 1))
        pause *= 2
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    """A client error (401, 403, 410, ...) will be the same next time; 408 and 429 ask for patience."""
    status = getattr(error, "status", 0) or getattr(error, "code", 0)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 429)
    return type(error).__name__ not in ("NoCredentialsError", "ParamValidationError", "InvalidURL")


def _is_http(url: str) -> bool:
    return url.startswith(("https://", "http://"))


def _filesystem(url: str) -> Any:
    scheme = url.partition("://")[0]
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        extra = "gcs" if scheme in ("gs", "gcs") else "cloud"
        raise UserError(
            f"{scheme}:// needs packages that are not installed ({error}): {how_to_install(extra)}"
        ) from error


def _fetch(url: str, start: int, stop: int) -> bytes:
    """Bytes start to stop - 1, or fewer where the object ends."""
    filesystem = _filesystem(url)
    if not _is_http(url):
        if url.startswith("s3://") and S3_VERSION in url:  # s3fs would take what is before it for the key
            raise ImageError(f"a key with {S3_VERSION!r} cannot be read: rename it")
        try:
            data: bytes = filesystem.cat_file(url, start=start, end=stop)
        except OSError as error:
            if start == 0 and error.errno == errno.EINVAL:  # S3's answer for an empty object
                return b""
            raise
        return data
    # A stream, so that a server that sends more than was asked for cannot fill the memory; `size` saves
    # the question for it.
    ranged = {"headers": {"Range": f"bytes={start}-{stop - 1}"}} if start else {}
    with filesystem.open(url, "rb", block_size=0, size=1, **ranged) as stream:
        if start and stream.r.status != 206:
            raise NoRangesError(f"{url}: this server does not read ranges of a file; download it first")
        parts, left = [], stop - start
        while left > 0 and (part := stream.read(left)):
            parts.append(part)
            left -= len(part)
    return b"".join(parts)

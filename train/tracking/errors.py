"""User errors in place of the exceptions of MLflow, requests, SQLAlchemy and artifact stores.

These share no base, and half of them are not installed: their attributes and names tell them apart.
"""

import re
import ssl
from collections.abc import Iterator
from typing import Any

from serve.contract.errors import LASTING as LASTING_ERRORS
from serve.contract.errors import UserError

LONGEST = 2000  # characters of a message; a proxy may answer with a whole page
HIDDEN = "***"  # in place of a password
PASSING_STATUS = (408, 409, 425, 429)
# MLflow's codes for whatever it caught: the cause says more
WRAPPERS = ("TEMPORARILY_UNAVAILABLE", "BAD_REQUEST", "INTERNAL_ERROR")
# classes of SQLAlchemy (URI, driver, statement), alembic (schema), botocore and google.auth
LASTING = re.compile(
    "ArgumentError|NoSuchModuleError|ProgrammingError|DataError|DatabaseError|CommandError"
    "|NoCredentialsError|PartialCredentialsError|ProfileNotFound|DefaultCredentialsError"
)
PASSING_SQLITE = re.compile("SQLITE_(BUSY|LOCKED|FULL|IOERR|NOMEM|PROTOCOL|INTERRUPT|SCHEMA)")
HALF_MADE = re.compile("no such table|already exists", re.I)  # another process is making the store
DATABASE_REFUSES = re.compile(
    "authentication failed|does not exist|no pg_hba|Access denied|Unknown database|permission denied", re.I
)
BAD_TLS = re.compile("CERTIFICATE_VERIFY_FAILED|WRONG_VERSION_NUMBER|UNSUPPORTED_PROTOCOL")
READ_ONLY_FILE_SYSTEM = 30  # errno.EROFS
PACKAGES = {
    "google": "google-cloud-storage",
    "azure": "azure-storage-blob azure-identity",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
}
"""Modules whose package has another name."""


class RefusedError(UserError):
    """MLflow refuses, and would again. The message is whole and has the way out."""

    about_values = False
    """One of several values is refused, or there are too many of them."""
    about_schema = False
    """The database is of another version of MLflow, or is being made."""


def translate(error: Exception, uri: str, recorded: str = "") -> UserError | ConnectionError:
    """Return what to raise in place of `error`: a ConnectionError if the same call may succeed later.

    `uri` is the store's, `recorded` where the run was logged before.
    """
    if isinstance(error, RefusedError):
        return error
    text = without_passwords(" ".join(str(error).split())) or type(error).__name__
    text = text.rstrip(".") if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    if _may_pass(error):
        return ConnectionError(f"MLflow at {uri} does not answer: {text[:200]}")
    advice = _way_out(error, uri, recorded)
    refused = RefusedError(f"MLflow at {uri} refuses: {text}" + (f". {advice}" if advice else ""))
    refused.about_values = _status(error) in (400, 413)
    refused.about_schema = _is_about_schema(error)
    return refused


def without_passwords(text: str) -> str:
    """Hide the passwords of addresses and keep their users, by whom a recorded store is found again."""
    return re.sub(r"(://[^/\s:@]*):[^/\s]+@", rf"\1:{HIDDEN}@", text)


def _may_pass(error: BaseException) -> bool:
    for each in _chain(error):
        verdict = _verdict(each)
        if verdict is not None:
            return verdict
    ours = type(error).__module__ == "builtins"  # a ValueError stays, a client's own exception may not
    return not ours or isinstance(error, OSError | EOFError | MemoryError | RuntimeError)


def _is_about_schema(error: BaseException) -> bool:
    return "database schema" in str(error) or "locate revision" in str(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes, outermost first."""
    known: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in known:
        known.add(id(following))
        yield following
        driver = getattr(following, "orig", None)  # SQLAlchemy's
        inner = driver if isinstance(driver, BaseException) else following.__cause__
        following = inner or following.__context__


def _verdict(error: Any) -> bool | None:
    """Return whether the error may pass; None if only its cause can tell."""
    status, name = _status(error), type(error).__name__
    if status:
        return status >= 500 or status in PASSING_STATUS
    sqlite = getattr(error, "sqlite_errorname", None)
    if isinstance(sqlite, str):
        half_made = sqlite == "SQLITE_ERROR" and HALF_MADE.search(str(error))
        return bool(PASSING_SQLITE.match(sqlite) or half_made)
    if isinstance(error, ImportError) or LASTING.fullmatch(name):
        # SQLAlchemy wraps SQLite's "file is not a database", whose name says more
        return None if getattr(error, "orig", None) is not None else False
    if isinstance(error, ssl.SSLError):
        return not BAD_TLS.search(str(error))
    if _cannot_be_written(error):
        return False
    if isinstance(error, OSError):
        if isinstance(error, ValueError):  # requests' of a URL or an answer that is no JSON
            return False
        return True if error.errno else None
    return False if name == "OperationalError" and DATABASE_REFUSES.search(str(error)) else None


def _cannot_be_written(error: BaseException) -> bool:
    return isinstance(error, LASTING_ERRORS) or getattr(error, "errno", None) == READ_ONLY_FILE_SYSTEM


def _status(error: Any) -> int:
    """Return the HTTP status of an answer, of whichever client, or of MLflow's own error; else 0."""
    response = getattr(error, "response", None)
    found: Any = getattr(response, "status_code", None)
    if isinstance(response, dict):  # botocore's
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if found is None:
        found = getattr(error, "status_code", None) or getattr(error, "code", None)  # azure's, google's
    if match := re.search(r"failed with error code (\d{3})\b", str(error)):
        found = int(match[1])
    elif found is None and hasattr(error, "get_http_status_code"):
        code, wraps = error.error_code, error.__cause__ is not None or "failed with" in str(error)
        if code not in WRAPPERS or not wraps:
            found = error.get_http_status_code()
        if code == "INTERNAL_ERROR" and not wraps and "error_code" not in getattr(error, "json", {}):
            found = 400  # MLflow's default for its own complaints, and for a proxy's JSON
    return found if isinstance(found, int) and 100 <= found < 600 else 0


def _way_out(error: Exception, uri: str, recorded: str) -> str:
    status, text = _status(error), str(error)
    chain = list(_chain(error))
    for each in chain:
        if isinstance(each, ImportError):
            module = (each.name or "").partition(".")[0]
            package = PACKAGES.get(module, module) or "the client library that it names"
            return f"Install it where this command runs: pip install {package}"
    if _is_about_schema(error):
        return (
            f"If an older MLflow made {uri}: back it up, then mlflow db upgrade {uri}; if a newer one did, "
            "install that version of MLflow"
        )
    if any(isinstance(each, ssl.SSLError) for each in chain):
        return (
            "Set MLFLOW_TRACKING_SERVER_CERT_PATH to the server's certificate authority, or correct the URL"
        )
    if status in (401, 403, 407):
        return (
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of a "
            "user with the permission; an artifact store has credentials of its own"
        )
    if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
        store = recorded if recorded not in ("", uri) else "the store that has it"
        return f"It is not in {uri}: set MLFLOW_TRACKING_URI to {store}, or give another name or ID"
    if status == 413:
        return "Raise the limit of the proxy before the server (client_max_body_size in nginx)"
    if status in (404, 405) or "JSON" in text or "nvalid url" in text:
        return (
            f"MLFLOW_TRACKING_URI {uri} must be the address of an MLflow server of about this version"
            + (", and https:// where it redirects to that" if status == 405 else "")
        )
    if any(map(_cannot_be_written, chain)):
        return (
            "Make that path writable on this machine; if it is a folder of the server's, start the server "
            "with --serve-artifacts and --artifacts-destination"
        )
    if "database" in text or any(hasattr(each, "sqlite_errorname") for each in chain):
        return f"Make {uri} a database that this user may write, or set MLFLOW_TRACKING_URI to another"
    return ""

"""Which errors of MLflow may pass, and the way out of those that do not.

MLflow's own exceptions, requests', SQLAlchemy's and those of artifact stores' clients share no base, and
half of them are not installed: what they carry tells them apart.
"""

import re
import ssl
from collections.abc import Iterator
from typing import Any

from serve.contract.errors import UserError

LONGEST = 2000  # characters of a message; a proxy may answer with a whole page
# MLflow's names of answers that another attempt may change
PASSING_CODES = frozenset(
    {
        "TEMPORARILY_UNAVAILABLE",
        "REQUEST_LIMIT_EXCEEDED",
        "RESOURCE_EXHAUSTED",
        "DEADLINE_EXCEEDED",
        "ABORTED",
        "CANCELLED",
        "RESOURCE_CONFLICT",
    }
)
WRAPPERS = frozenset({"TEMPORARILY_UNAVAILABLE", "BAD_REQUEST", "INTERNAL_ERROR"})
"""Codes that MLflow gives to whatever it caught: the cause says more."""
NO_PERMISSION = frozenset({"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"})
ABOUT_VALUES = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST"})
NEVER_PASS = frozenset(
    {
        "ArgumentError",  # SQLAlchemy's, of a URI
        "NoSuchModuleError",
        "ProgrammingError",
        "DataError",
        "DatabaseError",
        "CommandError",  # alembic's, of a schema that it does not know
        "NoCredentialsError",  # botocore's
        "PartialCredentialsError",
        "ProfileNotFound",
        "DefaultCredentialsError",  # google.auth's
    }
)
PASSING_SQLITE = (
    "SQLITE_BUSY",
    "SQLITE_LOCKED",
    "SQLITE_FULL",
    "SQLITE_IOERR",
    "SQLITE_NOMEM",
    "SQLITE_PROTOCOL",
    "SQLITE_INTERRUPT",
    "SQLITE_SCHEMA",
)
HALF_MADE = re.compile(r"no such table|already exists", re.I)  # another process is making the store
DATABASE_REFUSES = re.compile(
    r"authentication failed|does not exist|no pg_hba\.conf entry|Access denied|Unknown database|permission "
    r"denied",
    re.I,
)
BAD_TLS = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "UNSUPPORTED_PROTOCOL")
STAYING_OS_ERRORS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
READ_ONLY_FILE_SYSTEM = 30  # errno.EROFS
HIDDEN = "***"  # in place of a password
PACKAGES = {
    "google": "google-cloud-storage",
    "azure": "azure-storage-blob azure-identity",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
}
"""Modules whose package has another name."""


class RefusedError(UserError):
    """MLflow refuses, and would again. The message is whole and has the way out."""


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    for each in _chain(error):
        verdict = _verdict(each)
        if verdict is not None:
            return verdict
    ours = type(error).__module__ == "builtins"  # a ValueError stays, a client's own exception may not
    return not ours or isinstance(error, OSError | EOFError | MemoryError | RuntimeError)


def is_about_values(error: BaseException) -> bool:
    """One of many values may be what is refused, or there are too many of them."""
    return getattr(error, "error_code", "") in ABOUT_VALUES or _status(error) == 413


def is_about_schema(error: BaseException) -> bool:
    return "database schema" in str(error) or "locate revision" in str(error)


def explain(error: BaseException, uri: str, place: str = "") -> str:
    """The whole message, and the way out. `uri` is the store's, `place` where the run was logged before."""
    text = without_passwords(" ".join(str(error).split())) or type(error).__name__
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    advice = "" if isinstance(error, RefusedError) else _way_out(error, without_passwords(uri), place)
    return f"{text.rstrip('.')}. {advice}" if advice else text


def without_passwords(text: str) -> str:
    """Hide the passwords of addresses and keep their users, by whom a recorded store is found again."""
    return re.sub(r"(://[^/\s:@]*):[^/\s]+@", rf"\1:{HIDDEN}@", text)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was made of, outermost first."""
    known: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in known:
        known.add(id(following))
        yield following
        driver = getattr(following, "orig", None)  # SQLAlchemy's
        inner = driver if isinstance(driver, BaseException) else following.__cause__
        following = inner or following.__context__


def _verdict(error: BaseException) -> bool | None:
    """None: what it was made of says more, if there is anything."""
    status = _status(error)
    if status:
        return status >= 500 or status in (408, 425, 429)
    sqlite = getattr(error, "sqlite_errorname", None)
    if isinstance(sqlite, str):
        half_made = sqlite == "SQLITE_ERROR" and bool(HALF_MADE.search(str(error)))
        return sqlite.startswith(PASSING_SQLITE) or half_made
    if isinstance(error, ImportError) or type(error).__name__ in NEVER_PASS:
        # SQLAlchemy wraps SQLite's "file is not a database", whose name says more
        return None if getattr(error, "orig", None) is not None else False
    if isinstance(error, ssl.SSLError):
        return not any(reason in str(error) for reason in BAD_TLS)
    if isinstance(getattr(error, "error_code", None), str):
        return _mlflow_verdict(error)
    if isinstance(error, STAYING_OS_ERRORS) or getattr(error, "errno", None) == READ_ONLY_FILE_SYSTEM:
        return False
    if isinstance(error, OSError):
        if isinstance(error, ValueError):  # requests' of a URL or an answer that is no JSON
            return False
        return True if error.errno else None
    if type(error).__name__ == "OperationalError":
        return None if not DATABASE_REFUSES.search(str(error)) else False
    return None


def _mlflow_verdict(error: Any) -> bool | None:
    code: str = error.error_code
    if code in WRAPPERS and (error.__cause__ is not None or "failed with" in str(error)):
        return None
    if code == "INTERNAL_ERROR":  # MLflow's default for its own complaints, and for a proxy's JSON
        return "error_code" in getattr(error, "json", {})
    return code in PASSING_CODES


def _status(error: BaseException) -> int:
    """HTTP status of an answer, of whichever client; 0: there was none."""
    response = getattr(error, "response", None)
    found: Any = getattr(response, "status_code", None)
    if isinstance(response, dict):  # botocore's
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if found is None:
        found = getattr(error, "status_code", None) or getattr(error, "code", None)  # azure's, google's
    if found is None and (said := re.search(r"failed with error code (\d{3})\b", str(error))):
        found = int(said[1])
    return found if isinstance(found, int) and 100 <= found < 600 else 0


def _way_out(error: BaseException, uri: str, place: str) -> str:
    code, status, text = getattr(error, "error_code", ""), _status(error), str(error)
    chain = list(_chain(error))
    missing = next((e for e in chain if isinstance(e, ImportError)), None)
    if missing is not None:
        module = (missing.name or "").partition(".")[0]
        package = PACKAGES.get(module, module) or "the client library that it names"
        return f"Install it where this command runs: pip install {package}"
    if is_about_schema(error):
        return (
            f"If an older MLflow made {uri}: back it up, then mlflow db upgrade {uri}; if a newer one did, "
            "install that version of MLflow here"
        )
    if any(isinstance(e, ssl.SSLError) for e in chain):
        return (
            "Set MLFLOW_TRACKING_SERVER_CERT_PATH to the server's certificate authority, or correct the URL"
        )
    if "deleted experiment" in text:
        return "mlflow experiments restore --experiment-id ID brings it back; or give another --experiment"
    if code in NO_PERMISSION or status in (401, 403, 407):
        return (
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of one "
            "who may do this; an artifact store has credentials of its own"
        )
    if code == "RESOURCE_DOES_NOT_EXIST":
        store = place if place not in ("", uri) else "the store that has it"
        return f"It is not in {uri}: set MLFLOW_TRACKING_URI to {store}, or give another name or ID"
    if status == 413:
        return "Raise the limit of the proxy before the server (client_max_body_size in nginx)"
    if code == "ENDPOINT_NOT_FOUND" or status in (404, 405) or "JSON" in text or "nvalid url" in text:
        return f"MLFLOW_TRACKING_URI {uri} must be the address of an MLflow server of about this version"
    if any(isinstance(e, STAYING_OS_ERRORS) for e in chain) or any(
        getattr(e, "errno", None) == READ_ONLY_FILE_SYSTEM for e in chain
    ):
        return (
            "Make that place writable here; if it is a folder of the server's, start the server with "
            "--serve-artifacts and --artifacts-destination, so that clients need not write there"
        )
    if any(isinstance(getattr(e, "sqlite_errorname", None), str) for e in chain) or "database" in text:
        return f"Make {uri} a database that this user may write, or set MLFLOW_TRACKING_URI to another"
    return ""

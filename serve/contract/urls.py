"""URLs: the file that one names, and what of it may be printed or written.

A URL can hold a password (https://user:password@host) or a signature (?X-Amz-Signature=...), by which
whoever reads it acts in its owner's name. Messages, rows, manifests and MLflow get it through `redact`.
"""

import re
from collections.abc import Callable
from urllib.parse import quote, unquote

HIDDEN = "***"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_Unwanted = Callable[[str, str], bool]  # of a parameter's name, in lower case, and its value
# Up to the last @ before the path; a password may also hold / ? #, if what follows the colon is no port.
# In Azure's URLs the container is before the @.
_USERINFO = re.compile(
    r"""(?<=://)(?<!\babfs://)(?<!\babfss://)(?<!\bwasb://)(?<!\bwasbs://)(?:[^\s/?#"<>]*@|(?!arn:)[^\s/?#"<>@:\[]+:(?!\d{1,5}(?:[/?#]|$))[^\s"<>@]*@)"""
)
_QUERY = re.compile(r'([?#])([^\s"<>?#]*=[^\s"<>?#]*)')
_END = re.compile(r"[\])}'.,:;]*$")  # of the sentence, not of the URL

# Parameters that sign a request for one object: S3, Google, Azure, CloudFront and others. They come and go
# with each signing, and say nothing about which object it is; x-oss-process asks for another picture of it.
_SIGNATURE = re.compile(
    r"sig|.*signature.*|x-(amz|goog|ms|oss|obs|cos|tos)-(?!process$).+|q-(ak|sign|key|header|url).*|hdn(ea|ts|tl)"
)
_BESIDE_A_SIGNATURE = re.compile(
    r"expires?|policy|key-pair-id|.*access[-_]?(key)?[-_]?id|s([eprstv]|pr|rt|ip|dd)|sk(oid|tid|[tesv])"
    r"|s[au]oid|scid"
)
_SECRET = re.compile(
    r".*(token|secret|passw|passphrase|credential|(api|access|private|auth|subscription)[-_]?key|hmac|jwt"
    r"|session|bearer).*|auth(?!or).*|pass|pwd|sas"
)
_KEY_VALUE = re.compile(r"[\w-]{16,}")  # ?key=photos/1.jpg names a file


def last_part(location: str) -> str:
    """Return the last part of a path or URL without its query: a short name for a data set."""
    return url_path(location).rstrip("/").rpartition("/")[2]


def redact(text: object, hidden: str = HIDDEN) -> str:
    """The text, as of an error, with `hidden` in place of the secrets of all URLs in it."""
    return _without(str(text), hidden, _is_secret)


def unsigned(url: str) -> str:
    """The URL without what signs it: two of one object come out the same, whenever they were signed."""
    return _without(url, "", lambda key, _: bool(_SIGNATURE.fullmatch(key)))


def is_remote(name: str) -> bool:
    """Return whether a name is a URL, of whatever scheme, and not a local path."""
    return bool(_SCHEME.match(name))


def is_http(name: str) -> bool:
    """Return whether a name is a URL of a web server, which has files and no folders."""
    return name.startswith(("http://", "https://"))


def url_path(name: str) -> str:
    """Return an HTTP URL without its query, which tells the kind of file; any other name as it is."""
    return re.split("[?#]", name, maxsplit=1)[0] if is_http(name) else name


def join_url(folder: str, name: str) -> str:
    """Return the URL of a name below a folder's, also of ../name: object stores know no such folder.

    A doubled slash is part of a key.
    """
    scheme, _, path = folder.partition("://")
    parts: list[str] = []
    for part in f"{path}/{name.lstrip('/')}".split("/"):
        if part == "..":
            del parts[max(1, len(parts) - 1) :]
        elif part != ".":
            parts.append(part)
    return f"{scheme}://{'/'.join(parts)}"


def split_credentials(url: str) -> tuple[str, str, str]:
    """("https://host/...", user, password) of https://user:password@host/..., both "" without."""
    found = _USERINFO.search(url)
    if found is None:
        return url, "", ""
    user, _, password = found[0][:-1].partition(":")
    return url[: found.start()] + url[found.end() :], unquote(user), unquote(password)


def _is_secret(key: str, value: str) -> bool:
    if key == "key":
        return bool(_KEY_VALUE.fullmatch(value))
    return bool(_SIGNATURE.fullmatch(key) or _SECRET.fullmatch(key))


def _without(text: str, hidden: str, unwanted: _Unwanted) -> str:
    if "://" in text:
        text = _USERINFO.sub(f"{hidden}@" if hidden else "", text)
    if "=" in text:
        text = _QUERY.sub(lambda found: _query(found[1], found[2], hidden, unwanted), text)
    return text


def _query(mark: str, parameters: str, hidden: str, unwanted: _Unwanted) -> str:
    pairs = [part.partition("=") for part in re.split(r"&|;(?=[^&;=]+=)", parameters)]
    keys = [unquote(key).lower() for key, _, _ in pairs]
    secret = [unwanted(key, value) for key, (_, _, value) in zip(keys, pairs, strict=True)]
    signed = any(map(_SIGNATURE.fullmatch, keys))
    kept = [
        f"{key}{equals}{_nested(value, hidden, unwanted)}"
        for lower, (key, equals, value), is_secret in zip(keys, pairs, secret, strict=True)
        if not is_secret and not (signed and _BESIDE_A_SIGNATURE.fullmatch(lower))
    ]
    if len(kept) == len(pairs):
        return mark + ("&".join(kept) if "%" in parameters else parameters)
    if hidden:
        kept.append(hidden)
    end = _END.search(parameters)
    return (mark if kept else "") + "&".join(kept) + (end[0] if end and secret[-1] else "")


def _nested(value: str, hidden: str, unwanted: _Unwanted) -> str:
    """A URL in a URL's parameter is percent-encoded."""
    if "%3a%2f%2f" not in value.lower():
        return value
    inner = unquote(value)
    clean = _without(inner, hidden, unwanted)
    return value if clean == inner else quote(clean, safe="*")

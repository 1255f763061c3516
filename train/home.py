"""A home folder for libraries where the account has none, as in containers with bare user IDs."""

import os
import pwd
import tempfile
from pathlib import Path


def ensure_home() -> str:
    """Set LOGNAME, HOME and XDG_CACHE_HOME where libraries would fail without; call before their imports.

    Returns a warning if they keep files in a temporary folder, else "".
    """
    user = os.getuid()
    try:
        pwd.getpwuid(user)
    except KeyError:
        os.environ.setdefault("LOGNAME", f"user{user}")
    home = Path(os.path.expanduser("~"))  # "~" itself if nobody knows
    if home.is_absolute() and _is_writable(home / ".cache"):
        return ""
    own = _own_folder(f"purebred-{user}")
    if not home.is_absolute():
        os.environ["HOME"] = str(own)
    os.environ.setdefault("MPLCONFIGDIR", str(own / "matplotlib"))
    if os.environ.get("XDG_CACHE_HOME"):
        return ""
    os.environ["XDG_CACHE_HOME"] = str(own)
    return (
        f"warning: this user has no home folder that can be written, and libraries keep files in {own}: "
        "set HOME or XDG_CACHE_HOME to keep them elsewhere"
    )


def _is_writable(folder: Path) -> bool:
    """Return whether a folder can be written, or made."""
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _own_folder(name: str) -> Path:
    """Return the temporary folder of this name, or a new one if somebody else has taken the name."""
    folder = Path(tempfile.gettempdir()) / name
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat(follow_symlinks=False).st_uid == os.getuid():
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix=f"{name}-"))

"""A home folder for libraries, where the account has none: containers are started with bare user IDs."""

import os
import pwd
import tempfile
from pathlib import Path


def ensure_home() -> str:
    """Set LOGNAME, HOME and XDG_CACHE_HOME where libraries would fail without (mlflow does when it is
    imported); call before their imports. Returns a warning if they keep files in a temporary folder."""
    user = os.getuid()
    try:
        pwd.getpwuid(user)
    except KeyError:
        os.environ.setdefault("LOGNAME", f"user{user}")
    home = Path(os.path.expanduser("~"))  # "~" itself if nobody knows
    if _can_be_written(home / ".cache"):
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


def _can_be_written(folder: Path) -> bool:
    """It is there, or could be made."""
    if not folder.is_absolute():
        return False
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _own_folder(name: str) -> Path:
    """The same at each call, unless somebody else has taken the name."""
    folder = Path(tempfile.gettempdir()) / name
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat(follow_symlinks=False).st_uid == os.getuid():
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix=f"{name}-"))

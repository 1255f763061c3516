"""What to install where a package is missing: extras of this repository's own pyproject.toml."""

import sys
from importlib.util import find_spec


def how_to_install(extra: str) -> str:
    """Return the command. The project is on no package index: only a path names it."""
    return f"pip install '.[{extra}]' in purebred's repository"


def require(extra: str, *packages: str) -> None:
    """End a command in one line, with exit code 2, before it imports packages that are not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        print(f"error: {', '.join(missing)} is not installed: {how_to_install(extra)}", file=sys.stderr)
        sys.exit(2)

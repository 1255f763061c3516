"""Command lines of the programs but training, whose flags are its settings: one form of help and errors."""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from serve.contract.files import expand_arguments
from serve.contract.flag_names import OTHER_DASHES, canonical, suggestion

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = {
    "train/main.py": "purebred-train",
    "export/main.py": "purebred-export",
    "serve/main.py": "purebred-score",
    "serve/merge.py": "purebred-merge",
    "train/compare.py": "purebred-compare",
    "pipelines/evaluate.py": "purebred-evaluate",
    "pipelines/report.py": "purebred-report",
    "pipelines/doctor.py": "purebred-doctor",
}
"""Program -> the command that pip installs for it (project.scripts in pyproject.toml)."""


def command(program: str) -> str:
    """Return how to type a program, a path like train/main.py: `python train/main.py` in the repository,
    and purebred-train where it is installed as a package or such a command started this process."""
    if is_repository() and not any(Path(word).name in INSTALLED.values() for word in sys.orig_argv[:3]):
        return f"python {program}"
    module = program.removesuffix(".py").replace("/", ".")
    return INSTALLED.get(program, f"python -m {module}")


def is_repository() -> bool:
    """Return whether this is a clone, or was installed from one by pip install -e."""
    return (ROOT / "pyproject.toml").is_file()


@dataclass(frozen=True)
class Number:
    """Type of an option: a number from `low` to `high`, both included."""

    kind: type[int] | type[float]
    low: float = 0
    high: float = math.inf

    def __call__(self, text: str) -> float:
        value = self.kind(text)
        if not self.low <= value <= self.high or value == math.inf:  # NaN is not, either
            wrong = "must be" if self.high == math.inf else "is outside"
            raise argparse.ArgumentTypeError(f"{text} {wrong} {self}")
        return value

    @property
    def __name__(self) -> str:
        return {int: "integer", float: "number"}[self.kind]

    def __str__(self) -> str:
        return f"{self.low:g} or more" if self.high == math.inf else f"{self.low:g}..{self.high:g}"


MOST_SHOWN = 100  # characters of arguments that nothing takes
UNSAID = ("", "None", "False", "[]", argparse.SUPPRESS)  # defaults that say nothing


class Help(argparse.RawDescriptionHelpFormatter):
    """Help whose texts end in default and range in the form of training's."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        known = []
        if action.option_strings and str(action.default) not in UNSAID:
            shown = f"{action.default:g}" if isinstance(action.default, float) else action.default
            known.append(f"default: {str(shown).lower()}")
        if isinstance(action.type, Number):
            known.append(f"range: {action.type}")
        return f"{text} ({'; '.join(known)})" if known else text


class CommandLine(argparse.ArgumentParser):
    """Command line of a program: hyphens and underscores are the same, flags are typed in full, and errors
    are one line that names the flag, its value and the way out, with exit code 2."""

    def __init__(self, program: str, doc: str | None, usage: str = ""):
        """`program` is a path like serve/main.py, `doc` its module's docstring, `usage` the usual flags."""
        self.typed = command(program)
        super().__init__(
            prog=self.typed,
            usage=f"{self.typed} {usage}" if usage else None,
            description=(doc or "").replace(f"python {program}", self.typed),
            formatter_class=Help,
            allow_abbrev=False,
        )

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        given = [self._named(text) for text in expand_arguments(args)]
        found: tuple[argparse.Namespace, list[str]] = super().parse_known_args(given, namespace)
        return found

    def flags(self) -> list[str]:
        """Return all flags, each as it is typed."""
        return [flag for action in self._actions for flag in action.option_strings]

    def _named(self, text: str) -> str:
        """Return an argument with its flag as declared; an unknown flag is an error."""
        flag, equals, value = text.partition("=")
        declared = {name.replace("_", "-"): name for name in self.flags()}
        other_dash = flag[:1] in OTHER_DASHES and f"--{canonical(flag)}" in declared  # of a text editor
        if not (re.match("-+[A-Za-z]", flag) or other_dash):
            return text
        if name := declared.get(flag.replace("_", "-")):
            return name + equals + value
        hint = suggestion(flag, [name for name in declared if name.startswith("--")])
        after = "flags of train/main.py follow --" if "-- " in (self.usage or "") else ""
        return self.error("; ".join(filter(None, (f"{flag} is not a flag", hint, after))))

    def error(self, message: str) -> NoReturn:
        """Print argparse's message in one line, and exit with code 2."""
        message = re.sub(r"^argument (\S+): ", r"\1 ", message)
        if message.startswith("unrecognized arguments") and len(message) > MOST_SHOWN:
            message = f"{message[:MOST_SHOWN]}...; a pattern such as '*.jpg' must be in quotes"
        print(f"error: {message} ({self.typed} --help lists the flags)", file=sys.stderr)
        self.exit(2)

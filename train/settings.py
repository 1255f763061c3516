"""Declaration of a training setting: what is known of it stands beside its field, as metadata."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from serve.contract.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """What is declared of a setting. A condition is NAME, which holds when that setting differs from its
    default, or NAME=VALUE."""

    default: Any
    group: str
    """Where --help lists it."""
    usual: bool = False
    """--help lists it first, among those that are given most."""
    limits: tuple[float, float] | None = None
    """Lowest and highest value."""
    zero: bool = False
    """0 is accepted outside the limits too."""
    resumable: bool = False
    """May change when the run is resumed: it does not decide what is trained."""
    path: bool = False
    """Names a file or folder, in which a leading ~ is the home folder."""
    location: bool = False
    """Names the run directory: what a run is resumed by, not what it trains or is compared in."""
    per_start: bool = False
    """Belongs to one start of a run, and is not taken over when the run is resumed."""
    searched: bool = True
    """May be searched: it decides neither which images validate, nor how a trial is judged or stored."""
    needs: str = ""
    """Condition without which it has no effect; then giving it is an error."""
    overridden_by: tuple[str, ...] = ()
    """Conditions under which it has no effect; then giving it causes a warning."""

    def range(self) -> str:
        """Return the accepted values as in "0 or 8..2048"; "" without limits."""
        if self.limits is None:
            return ""
        low, high = self.limits
        return f"{'0 or ' if self.zero else ''}{low}..{high}"


def setting(default: T, group: str, **declared: Any) -> T:
    """Return a dataclass field with this default; `declared` are further attributes of `Setting`."""
    made: Any = field(default=default, metadata={"setting": Setting(default, group, **declared)})
    return made  # type: ignore[no-any-return]


def settings_of(config: "DataclassInstance | type[DataclassInstance]") -> dict[str, Setting]:
    """Return what is declared of each setting, by name."""
    return {f.name: f.metadata["setting"] for f in fields(config)}


def flag(name: str) -> str:
    """Return a setting's flag as it is typed: batch_size -> --batch-size."""
    return f"--{name.replace('_', '-')}"


def check_values(config: "DataclassInstance") -> None:
    """Raises UserError when a value is outside its limits, or a text cannot be stored."""
    for name, declared in settings_of(config).items():
        value = getattr(config, name)
        if declared.limits and value is not None and not (declared.zero and value == 0):
            low, high = declared.limits
            if not low <= value <= high:
                raise UserError(f"{flag(name)} {value} is outside {declared.range()}")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise UserError(
                f"{flag(name)} {value!r} is not UTF-8, which neither YAML nor MLflow can store: rename the "
                "file, or give a link to it"
            )


def given(config: "DataclassInstance") -> list[str]:
    """Return the names of the settings that differ from their defaults."""
    return [name for name, s in settings_of(config).items() if getattr(config, name) != s.default]


def unmet_needs(config: "DataclassInstance") -> dict[str, str]:
    """Return the given settings that have no effect because they need another one, and that condition."""
    needs = {name: settings_of(config)[name].needs for name in given(config)}
    return {name: need for name, need in needs.items() if need and not holds(need, config)}


def check_needs(config: "DataclassInstance") -> None:
    """Raises UserError when a given setting has no effect because it needs another one."""
    for name, need in unmet_needs(config).items():
        raise UserError(
            f"{flag(name)} {getattr(config, name)} has no effect without {_typed(need)}: give both, or none"
        )


def overridden_settings(config: "DataclassInstance") -> list[str]:
    """Return a warning for each given setting that has no effect because of another one."""
    declared = settings_of(config)
    return [
        f"warning: {flag(name)} {getattr(config, name)} has no effect with {_typed(condition)}"
        for name in given(config)
        for condition in declared[name].overridden_by
        if holds(condition, config)
    ]


def refuse_given(config: "DataclassInstance", names: Iterable[str], command: str) -> None:
    """Raises UserError when `config` gives what `command` itself gives to the runs that it starts: settings
    of these names, and those of a single start."""
    declared = settings_of(config)
    for name in given(config):
        if declared[name].per_start or name in names:
            raise UserError(f"{flag(name)} is set for each run by {command}: leave it out")


def holds(condition: str, config: "DataclassInstance") -> bool:
    name, _, value = condition.partition("=")
    actual = getattr(config, name)
    return str(actual).lower() == value if value else actual != settings_of(config)[name].default


def _typed(condition: str) -> str:
    name, _, value = condition.partition("=")
    return f"{flag(name)} {value}".rstrip()


def read_yaml(path: Path, flag: str, example: str) -> dict[str, Any]:
    """Return the entries of a YAML file that `flag` names; raises UserError with a line as an `example`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path} must hold lines like `{example}`")
    return {str(name): entry for name, entry in content.items()}

"""The settings as flags and as YAML: read from a command line or file, written to a run's folder."""

import json
import os
from argparse import ArgumentError
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from serve.contract.command_line import command
from serve.contract.errors import UserError
from serve.contract.files import atomic_write
from serve.contract.flag_names import suggestion
from train.config import SETTINGS, TrainConfig
from train.settings import check_needs, flag, read_yaml

PROGRAM, RECIPES = "train/main.py", Path(__file__).with_name("recipes")
USUAL = "usual settings"
TYPES = get_type_hints(TrainConfig)
KINDS = {int: "integer", float: "number", str: "text"}


class SettingsHelp(DefaultHelpFormatter):
    """Help whose texts name default and range in one form, in place of jsonargparse's."""

    def _get_help_string(self, action: Any) -> str:
        return str(action.help)


def build_parser() -> ArgumentParser:
    """Return the command line of TrainConfig; `--config FILE` reads the same names from YAML."""
    script = command(PROGRAM).removeprefix("python ")
    torchrun = f"torchrun --nproc_per_node=4 {'' if script == PROGRAM else '--no-python '}{script}"
    parser = ArgumentParser(
        prog=command(PROGRAM),
        usage=f"{command(PROGRAM)} --data DIR [--SETTING VALUE ...]\n       {torchrun} ...",
        description="Train an image classifier on all devices of a machine, or of many.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
        formatter_class=SettingsHelp,
    )
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help=f"YAML file with any of these settings, or a recipe: {', '.join(recipes())}",
    )
    texts = {entry.arg_name: entry.description for entry in parse_from_object(TrainConfig).params}
    titles = [USUAL, *dict.fromkeys(setting.group for setting in SETTINGS.values())]
    groups = {title: parser.add_argument_group(title) for title in titles}
    for name, setting in SETTINGS.items():
        choices = _choices(name)
        known = [] if setting.default in ("", None) else [f"default: {str(setting.default).lower()}"]
        known += [f"range: {setting.range()}"] if setting.limits else []
        groups[USUAL if setting.usual else setting.group].add_argument(
            flag(name),
            type=TYPES[name],
            default=setting.default,
            metavar=f"{{{','.join(choices)}}}" if choices else KINDS[_kind(name)].upper(),
            help=f"{texts[name]} ({'; '.join(known)})" if known else texts[name],
        )
    return parser


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Return the settings of a command line. With --resume RUN that run's settings are the defaults.

    Raises:
        UserError: an unknown flag, an unusable value, or a setting that has no effect without another one;
            the message names the flag and the limit.
    """
    config = parse_unchecked(argv)
    if config.resume in ("", "auto"):
        check_needs(config)
        return config
    saved = Path(config.resume) / "config.yaml"
    if config.name not in ("", Path(config.resume).resolve().name):
        raise UserError(
            f"--name {config.name} has no effect with --resume {config.resume}, which continues that run: "
            "leave it out, or start a new run from its weights (--weights)"
        )
    folder = Path(config.resume).resolve().parent
    if config.output != SETTINGS["output"].default and Path(config.output).resolve() != folder:
        raise UserError(
            f"--output {config.output} has no effect with --resume {config.resume}, which continues in the "
            "run's own directory: leave it out, or copy the run and resume the copy"
        )
    if not saved.is_file():
        around = [folder for folder in saved.parents[1:] if (folder / "config.yaml").is_file()]
        hint = f"; give {around[0]}" if around else ""
        raise UserError(f"--resume {config.resume!r} is not a run directory: it has no config.yaml{hint}")
    new = [f"{flag(name)}={setting.default}" for name, setting in SETTINGS.items() if setting.per_start]
    return parse_unchecked([f"--config={saved}", *new, *argv])


def parse_unchecked(argv: Sequence[str]) -> TrainConfig:
    """Return the settings of a command line, or of an older run, also if some of them have no effect."""
    parser = build_parser()
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    pairs = read_flags(argv)
    try:
        values = parser.parse_args([f"{flag(name)}={value}" for name, value in pairs]).as_dict()
    except (ArgumentError, ValueError) as error:
        for name, value in given_values(argv).items():
            _check_value(parser, name, value)
        raise UserError(str(error)) from error
    del values["config"]
    return TrainConfig(**{name: _expanded(name, value) for name, value in values.items()})


def read_flags(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Return names of settings and their values as typed: --batch-size 8 --compile -> ("batch_size", "8"),
    ("compile", "true").

    Raises:
        UserError: an unknown flag, one without a value, or something else than a flag.
    """
    pairs, rest = [], list(argv)
    while rest:
        typed, equals, value = rest.pop(0).partition("=")
        name = typed.removeprefix("--").replace("-", "_")
        if not typed.startswith("--"):
            hint = _hint(typed) if equals or not typed[:1].isalnum() else ""
            hint = hint or "; no flag that takes a value precedes it"
            raise UserError(f"{typed + equals + value!r} is not a flag{hint}")
        if name != "config":
            _check_name(name, typed)
        if not equals:
            following = rest[0] if rest else "--"
            if _is_switch(name) and following.lower() not in _choices(name):
                value = "true"
            elif following.startswith("--"):
                raise UserError(f"{typed} needs a value")
            else:
                value = rest.pop(0)
        pairs.append((name, find_config(value) if name == "config" else _expanded(name, value)))
    return pairs


def given_values(argv: Sequence[str]) -> dict[str, Any]:
    """Return the settings that a command line gives by a flag, as text, or by a file of --config.

    Raises:
        UserError: such a file cannot be read, or there is an unknown flag or setting.
    """
    values: dict[str, Any] = {}
    for name, value in read_flags(argv):
        if name != "config":
            values[name] = value
            continue
        for typed, entry in read_yaml(Path(value), "--config", "lr: 0.01").items():
            key = typed.replace("-", "_")
            _check_name(key, f"--config {value}: {typed}")
            values[key] = _expanded(key, entry)
    return values


def recipes() -> dict[str, Path]:
    """Return the files of settings that belong to the package, by the name that --config takes."""
    return {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}


def find_config(typed: str) -> str:
    """Return the path of a file of settings. A recipe is found from any folder, by its name or by its path
    in the repository; a file that exists comes first.

    Raises:
        UserError: there is neither.
    """
    path, known = Path(os.path.expanduser(typed)), recipes()
    if path.exists():
        return str(path)
    if path.stem in known and str(path.parent) in (".", "train/recipes"):
        return str(known[path.stem])
    raise UserError(f"--config {typed} does not exist, and the recipes are {', '.join(known)}")


def save_config(config: TrainConfig, path: Path) -> None:
    """Write YAML that `--config` reads back: texts in quotes, or a name like 1e3 would become a number."""
    values = config.to_dict().items()
    text = "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in values)
    with atomic_write(path, "w") as file:
        file.write(text)


def _expanded(name: str, value: Any) -> Any:
    """Return a setting's value, of a path with the home folder in place of ~."""
    return os.path.expanduser(value) if isinstance(value, str) and SETTINGS[name].path else value


def _check_name(name: str, typed: str) -> None:
    if name not in SETTINGS:
        raise UserError(f"{typed} is not a setting{_hint(name)} ({command(PROGRAM)} --help lists them)")


def _hint(typed: str) -> str:
    """Return a semicolon and what to give in place of a flag that is not one; "" if nothing comes close."""
    hint = suggestion(typed, ["--config", *map(flag, SETTINGS)], values=True)
    return f"; {hint}" if hint else ""


def _check_value(parser: ArgumentParser, name: str, value: Any) -> None:
    try:
        parser.parse_object({name: value})
    except ArgumentError as error:
        choices = _choices(name)
        expected = f"one of {', '.join(choices)}" if choices else f"of type {KINDS[_kind(name)]}"
        raise UserError(f"{flag(name)} {value!r} must be {expected}") from error


def _kind(name: str) -> Any:
    """Return a setting's type, without the None of `float | None`."""
    return TYPES[name] if get_origin(TYPES[name]) in (None, Literal) else get_args(TYPES[name])[0]


def _is_switch(name: str) -> bool:
    """Return whether a flag without a value is true."""
    return name in TYPES and _kind(name) is bool and type(None) not in get_args(TYPES[name])


def _choices(name: str) -> tuple[str, ...]:
    """Return the values that a setting of few values takes; () for numbers and text."""
    kind = _kind(name)
    if kind is not bool:
        return get_args(kind)
    others = [get_args(member) for member in get_args(TYPES[name]) if get_origin(member) is Literal]
    return ("true", "false", *chain.from_iterable(others))

"""The settings as flags and as YAML: read from a command line or file, written to a run's folder."""

import difflib
import json
import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from serve.contract.errors import UserError
from serve.contract.files import atomic_write
from train.config import TrainConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)

KINDS = {bool: "neither true nor false", int: "no whole number", float: "no number", str: "no text"}


def build_parser(defaults: dict[str, Any] | None = None) -> ArgumentParser:
    """The command line of TrainConfig; `--config FILE` reads the same names from YAML."""
    parser = ArgumentParser(
        prog="train/main.py",
        description="torchrun --nproc_per_node=4 train/main.py --data DIR",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_class_arguments(TrainConfig)
    if defaults:
        parser.set_defaults(defaults)
    return parser


def parse_config(argv: list[str]) -> TrainConfig:
    """Flags (dashes or underscores) -> TrainConfig. With --resume the run's settings are the defaults.

    Raises:
        UserError: an unknown flag or an unusable value; the message names it and the limit.
    """
    config = _parse(argv, None)
    if config.resume in ("", "auto"):
        return config
    saved = Path(config.resume) / "config.yaml"
    if not saved.is_file():
        raise UserError(f"--resume {config.resume!r} is not a run directory: it has no config.yaml")
    defaults = _parse(["--config", str(saved)], None).to_dict()
    del defaults["stop_after"]  # that interruption is over
    return _parse(argv, defaults)


def _parse(argv: list[str], defaults: dict[str, Any] | None) -> TrainConfig:
    try:
        values = build_parser(defaults).parse_args(normalise_flags(argv)).as_dict()
    except Exception as error:  # argparse's and jsonargparse's errors share no base
        raise UserError(f"{_plainly(str(error))} (train/main.py --help lists the settings)") from error
    values.pop("config", None)
    return TrainConfig(**values)


def _plainly(message: str) -> str:
    """What the parser says of a value, in the words of a command line; of a flag, with the closest one."""
    hints = get_type_hints(TrainConfig)
    unknown = re.search(r"nrecognized arguments: --(\w+)", message)
    if unknown:
        closest = difflib.get_close_matches(unknown[1], hints, 1)
        return message + "".join(f"; the closest flag is --{name}" for name in closest)
    setting, value = re.match(r'Parser key "(\w+)"', message), re.search(r" value: (.*)", message)
    if not setting or not value or setting[1] not in hints:
        return re.sub(r'^Parser key "(\w+)"', r"--\1", message)
    hint = hints[setting[1]]
    kinds = get_args(hint) or (hint,)
    if get_origin(hint) is Literal:
        wanted = f"none of {', '.join(kinds)}"
    else:
        wanted = next(words for kind, words in KINDS.items() if kind in kinds)
    return f"--{setting[1]} {value[1]!r} is {wanted}"


def normalise_flags(argv: list[str]) -> list[str]:
    """--batch-size 8 -> --batch_size 8, and a bare --deterministic -> --deterministic=true."""
    switches = {f.name for f in fields(TrainConfig) if f.type is bool}
    result: list[str] = []
    for argument, following in pairwise([*argv, ""]):
        if not argument.startswith("--"):
            result.append(argument)
            continue
        flag, equals, value = argument[2:].partition("=")
        name = flag.replace("-", "_")
        if name in switches and not equals and following.lower() not in ("true", "false"):
            equals, value = "=", "true"
        result.append(f"--{name}{equals}{value}")
    return result


def save_config(config: TrainConfig, path: Path) -> None:
    """As YAML that `--config` reads back: texts in quotes, or a name like 1e3 would become a number."""
    values = config.to_dict().items()
    text = "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in values)
    with atomic_write(path, "w") as file:
        file.write(text)

"""The search space of a sweep: setting -> range or choices, and how a drawn value becomes a flag."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from serve.contract.errors import UserError
from train.cli import normalise_flags, parse_config
from train.config import TrainConfig
from train.optim.optimizers import resolve_optimizer

AUGMENTATION = "augmentation"
"""Not a setting: one strength in 0..1 for several, for a sweep cannot afford a dimension for each (the
argument of RandAugment, arXiv 1909.13719)."""

# And the learning rate, from a tenth to ten times the optimizer's usual one.
DEFAULT_SPACE: dict[str, dict[str, Any]] = {
    "weight_decay": {"low": 1e-4, "high": 0.3, "log": True},
    AUGMENTATION: {"low": 0.0, "high": 1.0},
    "model": {"choices": ["simple_cnn", "resnet18", "mobilenet_v3_small"]},
}

# They decide which images are validated, by what a trial is judged, or where it is kept.
NOT_SEARCHED = frozenset(
    {"data", "data_format", "val_data", "val_fraction", "folds", "fold", "near_duplicates", "exclude"}
    | {"max_bad", "seed", "best_by", "calibrate"}
    | {"output", "name", "experiment", "track", "resume", "stop_after", "device"}
)
TYPES = {f.name: f.type for f in fields(TrainConfig)}

Space = dict[str, BaseDistribution]


def augmentation(strength: float) -> dict[str, float]:
    """0: none but the flip; 1: the strengths customary on ImageNet (crops from 8 % of the area on, jitter
    0.4, erasing 0.25, mixup 0.2)."""
    return {
        "crop_scale": round(1 - 0.92 * strength, 4),
        "color_jitter": round(0.4 * strength, 4),
        "random_erasing": round(0.25 * strength, 4),
        "mixup": round(0.2 * strength, 4),
    }


def given_settings(argv: Sequence[str]) -> set[str]:
    """Settings that the command line fixes by a flag, or by a file of --config.

    Raises:
        UserError: such a file cannot be read.
    """
    names: set[str] = set()
    normalised = normalise_flags(list(argv))
    for flag, following in pairwise([*normalised, ""]):
        name, equals, value = flag.removeprefix("--").partition("=")
        if flag.startswith("--") and name != "config":
            names.add(name)
        elif flag.startswith("--"):
            names |= {
                key.replace("-", "_")
                for key in _read_yaml(Path(value if equals else following), "--config")
            }
    return names


def read_space(path: Path | None, argv: Sequence[str]) -> Space:
    """The space in a YAML file, or the default one without the settings that `argv` fixes.

    Every bound and choice is tried on train/main.py's parser together with `argv`.

    Raises:
        UserError: not a space, a name that is no setting, or a value that the setting refuses.
    """
    given = given_settings(argv)
    if path is None:
        lr = resolve_optimizer(parse_config([*argv, "--lr=null"])).lr
        assert lr is not None
        usual = {"lr": {"low": lr / 10, "high": lr * 10, "log": True}} | DEFAULT_SPACE
        described = {name: entry for name, entry in usual.items() if name not in given}
        source = "the default space"
    else:
        described, source = _read_yaml(path, "--space"), f"--space {path}"
        twice = sorted(given & set(described))
        if twice:
            raise UserError(f"{source} searches {', '.join(twice)}, which the command line fixes: drop one")
    if not described:
        raise UserError(f"{source}: nothing is left to search")
    if AUGMENTATION in described:
        both = sorted(set(augmentation(1)) & set(described))
        if both:
            raise UserError(f"{source}: {AUGMENTATION} sets {', '.join(both)} too: search one or the other")
    space = {}
    for name, entry in described.items():
        try:
            space[name] = _distribution(name, entry)
            for value in extremes(space[name]):
                parse_config([*argv, *flags({name: value}, given)])
        except (ValueError, TypeError) as error:
            raise UserError(f"{source}, {name}: {error}") from error
    return space


def flags(parameters: Mapping[str, Any], given: set[str]) -> list[str]:
    """Drawn values as flags of train/main.py; `given` settings of augmentation stay as they are."""
    settings: dict[str, Any] = {}
    for name, value in parameters.items():
        if name == AUGMENTATION:
            settings |= {n: v for n, v in augmentation(value).items() if n not in given}
        else:
            settings[name] = value
    return [f"--{name}={_text(value)}" for name, value in settings.items()]


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)  # a float's repr is exact


def _read_yaml(path: Path, flag: str) -> dict[str, Any]:
    try:
        described = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} is no YAML: {error}") from error
    if not isinstance(described, dict):
        line = "lr: {low: 1.0e-4, high: 1.0e-2, log: true}" if flag == "--space" else "lr: 0.01"
        raise UserError(f"{flag} {path} must hold lines like `{line}`")
    return {str(name): entry for name, entry in described.items()}


def _distribution(name: str, entry: Any) -> BaseDistribution:
    """Raises UserError or TypeError; the caller names the setting."""
    if name in NOT_SEARCHED:
        raise UserError("cannot be searched: trials would not be comparable, or not be kept apart")
    if name not in TYPES and name != AUGMENTATION:
        raise UserError(f"is no setting of train/main.py, nor {AUGMENTATION}")
    keys = set(entry) if isinstance(entry, dict) else set()
    if keys == {"choices"}:
        choices = entry["choices"]
        plain = isinstance(choices, list) and all(isinstance(c, str | int | float | None) for c in choices)
        if not plain or not choices or len(set(map(repr, choices))) < len(choices):
            raise UserError(f"choices must be a list of different values, not {choices!r}")
        return CategoricalDistribution(choices)
    if not {"low", "high"} <= keys <= {"low", "high", "log"}:
        raise UserError(f"must be {{low: , high: , log: }} or {{choices: [, ]}}, not {entry!r}")
    kind = TYPES.get(name, float)
    if kind in (bool, str) or get_origin(kind) is Literal or kind == bool | None:
        raise UserError("takes no range: give its choices")
    low, high, log = entry["low"], entry["high"], entry.get("log", False)
    numbers = int if kind is int else (int, float)
    for bound in (low, high):
        if not isinstance(bound, numbers) or isinstance(bound, bool):
            hint = " (YAML reads 1e-4 as a text: write 1.0e-4)" if isinstance(bound, str) else ""
            raise UserError(f"{bound!r} is not {'a whole' if kind is int else 'a'} number{hint}")
    if not low < high or not isinstance(log, bool):
        raise UserError(f"low must be less than high and log true or false, not {entry!r}")
    if kind is int:
        return IntDistribution(low, high, log=log)
    return FloatDistribution(float(low), float(high), log=log)


def extremes(distribution: BaseDistribution) -> list[Any]:
    """All choices, or the ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return [distribution.low, distribution.high]

"""Search space of a sweep: setting -> range or choices, and the flags of sampled values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from serve.contract.errors import UserError
from train.cli import TYPES, given_values, parse_config, parse_unchecked
from train.config import SETTINGS
from train.optim.optimizers import resolve_optimizer
from train.settings import check_needs, flag, read_yaml, unmet_needs

AUGMENTATION = "augmentation"
"""One strength in 0..1 for several settings, as in RandAugment (arXiv 1909.13719): a sweep cannot afford a
dimension for each."""

# and the learning rate, from a tenth to ten times the optimizer's usual one
DEFAULT_SPACE: dict[str, dict[str, Any]] = {
    "weight_decay": {"low": 1e-4, "high": 0.3, "log": True},
    AUGMENTATION: {"low": 0.0, "high": 1.0},
    "model": {"choices": ["simple_cnn", "resnet18", "mobilenet_v3_small"]},
}

Space = dict[str, BaseDistribution]


def augmentation(strength: float) -> dict[str, float]:
    """Return settings from 0, none but the flip, to 1, the strengths that are customary on ImageNet."""
    return {
        "crop_scale": round(1 - 0.92 * strength, 4),
        "color_jitter": round(0.4 * strength, 4),
        "random_erasing": round(0.25 * strength, 4),
        "mixup": round(0.2 * strength, 4),
    }


def read_space(path: Path | None, argv: Sequence[str]) -> Space:
    """Return the space in a YAML file, or the default one without the settings that `argv` fixes.

    Every bound and choice is parsed together with `argv`.

    Raises:
        UserError: not a space, a name that is no setting, or a value that the setting refuses.
    """
    given = given_values(argv)
    if path is None:
        lr = resolve_optimizer(parse_config([*argv, "--lr=null"])).lr
        assert lr is not None
        usual = {"lr": {"low": lr / 10, "high": lr * 10, "log": True}} | DEFAULT_SPACE
        described = {name: entry for name, entry in usual.items() if name not in given}
        source = "the default space"
    else:
        described = read_yaml(path, "--space", "lr: {low: 1.0e-4, high: 1.0e-2, log: true}")
        source = f"--space {path}"
        twice = sorted(given.keys() & described.keys())
        if twice:
            raise UserError(f"{source} searches {', '.join(twice)}, which the command line fixes: drop one")
    if not described:
        raise UserError(f"{source}: nothing is left to search")
    if AUGMENTATION in described:
        both = sorted(augmentation(1).keys() & described.keys())
        if both:
            raise UserError(f"{source}: {AUGMENTATION} sets {', '.join(both)} too: search one or the other")
    space = {}
    for name, entry in described.items():
        try:
            space[name] = _distribution(name, entry)
            for value in extremes(space[name]):
                config = parse_unchecked([*argv, *_typed(_settings({name: value}, argv))])
                without = {need.partition("=")[0] for need in unmet_needs(config).values()}
                if not without <= described.keys():
                    check_needs(config)
        except (ValueError, TypeError) as error:
            raise UserError(f"{source}, {name}: {error}") from error
    return space


def flags(parameters: Mapping[str, Any], argv: Sequence[str]) -> list[str]:
    """Return sampled values as flags of train/main.py, to follow `argv`.

    Those of augmentation that `argv` fixes and those without effect beside the others are left out.
    """
    sampled = _settings(parameters, argv)
    unmet = unmet_needs(parse_unchecked([*argv, *_typed(sampled)]))
    return _typed({name: value for name, value in sampled.items() if name not in unmet})


def _settings(parameters: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    settings = dict(parameters)
    if AUGMENTATION in settings:
        given = given_values(argv)
        settings |= {n: v for n, v in augmentation(settings.pop(AUGMENTATION)).items() if n not in given}
    return settings


def _typed(settings: Mapping[str, Any]) -> list[str]:
    return [f"{flag(name)}={_text(value)}" for name, value in settings.items()]


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)  # a float's repr is exact


def _distribution(name: str, entry: Any) -> BaseDistribution:
    """Return an entry's distribution; the message of a UserError continues the setting's name."""
    if name not in SETTINGS and name != AUGMENTATION:
        raise UserError(f"is no setting of train/main.py, nor {AUGMENTATION}")
    if name in SETTINGS and not SETTINGS[name].searched:
        raise UserError("cannot be searched: trials would not be comparable, or not be kept apart")
    keys = set(entry) if isinstance(entry, dict) else set()
    if keys == {"choices"} and isinstance(entry["choices"], list):
        return CategoricalDistribution(entry["choices"])
    if not {"low", "high"} <= keys <= {"low", "high", "log"}:
        raise UserError(f"must be {{low: , high: , log: }} or {{choices: [, ]}}, not {entry!r}")
    kind = TYPES.get(name, float)
    if kind in (bool, str) or get_origin(kind) is Literal or get_args(kind)[:1] == (bool,):
        raise UserError("takes no range: give its choices")
    low, high, log = entry["low"], entry["high"], bool(entry.get("log"))
    if kind is not int:
        return FloatDistribution(float(low), float(high), log=log)  # YAML reads 1e-4 as a text
    if {type(low), type(high)} != {int}:
        raise UserError(f"takes whole numbers, not {low!r} to {high!r}")
    return IntDistribution(low, high, log=log)


def extremes(distribution: BaseDistribution) -> list[Any]:
    """Return all choices, or the ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return [distribution.low, distribution.high]


def values(distribution: BaseDistribution) -> list[Any]:
    """Return all choices, or all whole numbers of a range."""
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1))
    return extremes(distribution)

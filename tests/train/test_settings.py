"""What is declared of a setting holds: limits, needs, and which settings a command gives itself."""

import dataclasses
from typing import Any

import pytest

from train.config import SETTINGS, TrainConfig
from train.settings import (
    check_needs,
    flag,
    given,
    holds,
    overridden_settings,
    refuse_given,
    setting,
    unmet_needs,
)


@dataclasses.dataclass(frozen=True)
class Config:
    mode: str = setting("none", "model")
    share: float = setting(0.5, "model", limits=(0, 1), needs="mode")
    size: int = setting(0, "model", limits=(8, 16), zero=True, needs="mode=cam")
    strength: float = setting(0.2, "model", overridden_by=("auto=true",))
    auto: bool = setting(False, "model", per_start=True)


def test_a_setting_has_its_default() -> None:
    assert Config() == Config(mode="none", share=0.5, size=0, strength=0.2, auto=False)
    assert Config.share == 0.5
    assert given(Config(share=0.1)) == ["share"]


@pytest.mark.parametrize(
    ("config", "unmet"),
    [
        (Config(), {}),
        (Config(share=0.1), {"share": "mode"}),
        (Config(mode="box", share=0.1, size=8), {"size": "mode=cam"}),
        (Config(mode="cam", share=0.1, size=8), {}),
    ],
)
def test_a_setting_that_needs_another_has_no_effect_without(config: Config, unmet: dict[str, str]) -> None:
    assert unmet_needs(config) == unmet
    if not unmet:
        check_needs(config)
        return
    with pytest.raises(ValueError, match=f"{flag(next(iter(unmet)))} .*--mode"):
        check_needs(config)


def test_a_setting_that_another_one_overrides_causes_a_warning() -> None:
    assert overridden_settings(Config(auto=True)) == []
    assert overridden_settings(Config(strength=0.3)) == []
    (warning,) = overridden_settings(Config(auto=True, strength=0.3))
    assert "--strength 0.3" in warning
    assert "--auto true" in warning


def test_what_a_command_gives_to_its_runs_cannot_be_given_to_it() -> None:
    refuse_given(Config(share=0.1), ["mode"], "a sweep")
    for config, name in ((Config(mode="cam"), "--mode"), (Config(auto=True), "--auto")):
        with pytest.raises(ValueError, match=f"{name} .*a sweep"):
            refuse_given(config, ["mode"], "a sweep")


def test_conditions_name_settings_and_values_that_there_are() -> None:
    for declared in SETTINGS.values():
        for condition in filter(None, (declared.needs, *declared.overridden_by)):
            assert not holds(condition, TrainConfig())
            name, _, value = condition.partition("=")
            if value:
                kind = type(SETTINGS[name].default)
                typed: Any = {"true": True, "false": False}.get(value) if kind is bool else value
                changed = TrainConfig(crop_detector="d.pt").replace(
                    **{name: kind(typed) if SETTINGS[name].default is not None else value}
                )
                assert holds(condition, changed), condition


def test_limits_hold_for_the_defaults() -> None:
    for declared in SETTINGS.values():
        if declared.limits and declared.default is not None:
            low, high = declared.limits
            assert low <= declared.default <= high or (declared.zero and declared.default == 0)

"""--compile auto: taken where the steps of the run gain more than compiling takes, by injected timings."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from train_data import CPU, ONE, linear_model, settings

import train.engine.compilation as module
from train.data.sampler import EpochPlan
from train.distributed import Ranks
from train.engine.compilation import choose_compiled
from train.engine.state import build_state
from train.precision import Precision

PLAN = EpochPlan(1280, 128, 0)  # 10 steps an epoch


@pytest.fixture(autouse=True)
def _no_folder_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.CACHE_VARIABLE, "")  # so that it is removed again after the test
    monkeypatch.delenv(module.CACHE_VARIABLE)


def chosen(
    monkeypatch: pytest.MonkeyPatch, plain: float, first: float, compiled: float | Exception, **changes: Any
) -> tuple[bool, str]:
    """Return what is decided where steps last so long, and what was printed."""
    timed = {False: [9.0, plain], True: [first, compiled]}

    def seconds(step: Any, device: torch.device) -> float:
        value = timed[step].pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(module, "seconds_of", seconds)
    config = settings(Path("nowhere"), **{"compile": "auto", "epochs": 100} | changes)
    lines: list[str] = []
    taken = choose_compiled(config, PLAN, lambda compiled: compiled, CPU, lines.append)  # type: ignore[arg-type, return-value]
    return taken, "\n".join(lines)


@pytest.mark.parametrize(
    ("plain", "first", "compiled", "changes", "expected"),
    [
        (0.4, 60.0, 0.3, {}, True),  # 1,000 steps gain 100 s
        (0.4, 60.0, 0.35, {}, False),  # 50 s
        (0.4, 120.0, 0.3, {}, False),
        (0.4, 60.0, 0.5, {}, False),
        (0.4, 60.0, 0.3, {"epochs": 50}, False),  # not tried: 200 s in all
        (0.4, 60.0, 0.1, {"stop_after": 10}, False),
        (0.4, 60.0, 0.3, {"deterministic": True}, False),
        (0.4, 60.0, RuntimeError("no compiler"), {}, False),
        (0.4, torch.OutOfMemoryError("out of memory"), 0.3, {}, False),
        (0.4, 60.0, 0.5, {"compile": True}, True),
        (0.4, 60.0, 0.3, {"compile": False}, False),
    ],
)
def test_compiling_is_chosen_by_steps_times_gain(
    plain: float,
    first: Any,
    compiled: Any,
    changes: dict[str, Any],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken, printed = chosen(monkeypatch, plain, first, compiled, **changes)
    assert taken == expected
    assert bool(printed) == (changes.get("compile") is not False)
    assert not isinstance(compiled, Exception) or "no compiler" in printed


def one_rank_fails(ranks: Ranks) -> bool:
    with pytest.MonkeyPatch.context() as monkeypatch:
        compiled = RuntimeError("no compiler") if ranks.rank else 0.1
        return chosen(monkeypatch, 0.4, 60.0, compiled)[0]


def test_a_rank_that_cannot_compile_decides_for_all(tmp_path: Path) -> None:
    assert on_ranks(one_rank_fails, 2, tmp_path) == [False, False]


def test_too_little_memory_for_what_is_required_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        chosen(monkeypatch, 0.4, 60.0, torch.OutOfMemoryError("out of memory"), compile=True)


def test_what_is_compiled_is_kept_below_the_output_unless_the_user_chose_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path, tmp_path / "other"):  # the second finds the variable set
        chosen(monkeypatch, 0.4, 60.0, 0.3, output=str(folder))
        assert os.environ[module.CACHE_VARIABLE] == str(tmp_path / ".cache" / "inductor")


@pytest.mark.parametrize(
    ("setting", "chosen_before", "expected"),
    [("auto", True, True), ("auto", False, False), (True, False, True), (False, True, False)],
)
def test_a_run_is_compiled_as_it_was_chosen_at_its_start_also_when_resumed(
    setting: Any, chosen_before: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: compiled.append(self))
    precision = Precision(compiled=chosen_before)
    config = settings(tmp_path, compile=setting)
    state = build_state(config, linear_model(), 1, precision, ONE, CPU)
    assert bool(compiled) == expected
    assert Precision(**state.state_dict()["precision"]) == precision

"""Number format and memory layout: a clearly faster one is taken, and noise decides nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from train_data import CPU

from train.config import TrainConfig
from train.engine.autotune import (
    candidates,
    choose_option,
    compile_note,
    has_bf16,
    multiplies_bf16,
    time_options,
    time_step,
)
from train.precision import Precision


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (
            {},
            ["fp32, channels_last", "fp32, contiguous", "bf16, channels_last", "bf16, contiguous"],
        ),
        ({"precision": "bf16"}, ["bf16, channels_last", "bf16, contiguous"]),
        ({"channels_last": False}, ["fp32, contiguous", "bf16, contiguous"]),
        ({"precision": "fp32", "channels_last": True}, ["fp32, channels_last"]),
        ({"deterministic": True}, ["fp32, channels_last"]),
        ({"deterministic": True, "precision": "bf16", "channels_last": False}, ["bf16, contiguous"]),
    ],
)
def test_candidates_are_what_the_settings_leave_open(
    settings: dict, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.engine.autotune.has_bf16", lambda: True)
    assert [str(option) for option in candidates(TrainConfig(**settings), CPU)[0]] == names


def test_what_the_processor_only_emulates_is_no_candidate_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of emulated bf16 can take a minute."""
    monkeypatch.setattr("train.engine.autotune.has_bf16", lambda: False)
    assert [str(o) for o in candidates(TrainConfig(), CPU)[0]] == [
        "fp32, channels_last",
        "fp32, contiguous",
    ]
    given, _ = candidates(TrainConfig(precision="bf16", channels_last=True), CPU)
    assert [str(option) for option in given] == ["bf16, channels_last"]


def test_bf16_is_a_candidate_where_the_kernels_are() -> None:
    capable = {"avx512_bf16", "amx_bf16", "bf16"}
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else capable
    if capable & flags:
        assert has_bf16()


NAMES = ("fp32, channels_last", "fp32, contiguous", "bf16, channels_last", "bf16, contiguous")


def choice(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, *rounds: tuple[float, ...]
) -> tuple[str, list[str]]:
    """(what is taken, what was timed in what order) where steps last so long in each round, by NAMES."""
    monkeypatch.setattr("train.engine.autotune.has_bf16", lambda: True)
    monkeypatch.setattr("train.engine.autotune.multiplies_bf16", lambda device: bf16)
    timed: list[str] = []

    def measure(step: str, device: torch.device, max_steps: int) -> tuple[float, float]:
        number = timed.count(step)
        timed.append(step)
        return 9.0, rounds[min(number, len(rounds) - 1)][NAMES.index(step)]

    monkeypatch.setattr("train.engine.autotune.time_step", measure)
    options, default = candidates(TrainConfig(), CPU)
    times = time_options(options, default, str, CPU)  # type: ignore[arg-type]
    assert tuple(map(str, times)) == NAMES
    return str(choose_option(times, default)), timed


QUIET = (0.40, 0.41, 0.20, 0.21)


@pytest.mark.parametrize(
    ("bf16", "turns", "taken"),
    [
        (True, [QUIET], NAMES[2]),
        (True, [(0.17, 0.3, 0.3, 0.3)], NAMES[0]),
        (False, [(0.3, 0.3, 0.2, 0.15)], NAMES[3]),
        (False, [(0.20, 0.19, 0.21, 0.22)], NAMES[0]),
        (True, [(0.20, 0.19, 0.21, 0.22)], NAMES[2]),
        (True, [QUIET, (0.3, 0.3, 0.9, 0.9), QUIET, (0.3, 0.3, 0.9, 0.9), QUIET], NAMES[2]),
        (True, [(0.3, 0.3, 0.4, 0.4), (0.5, 0.41, 0.4, 0.3), (0.2, 0.9, 0.21, 0.2)] * 2, NAMES[2]),
    ],
    ids=[
        "bf16 is twice as fast",
        "fp32 is faster though bf16 is usual",
        "bf16 is faster though fp32 is usual",
        "all are alike without bf16 arithmetic",
        "all are alike with it",
        "other work on the machine hits bf16 twice",
        "no order is stable",
    ],
)
def test_a_clearly_faster_option_is_taken_or_the_default(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, turns: list[tuple[float, ...]], taken: str
) -> None:
    """Not the winner of noise: the same machine takes the same one, busy or not."""
    assert choice(monkeypatch, bf16, *turns)[0] == taken


def test_options_are_timed_in_turn_and_hopeless_ones_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, timed = choice(monkeypatch, True, QUIET)
    assert timed == [*NAMES, *NAMES[2:] * 4]
    _, slow = choice(monkeypatch, True, (1.7, 1.7, 1.2, 1.2))
    assert slow == [*NAMES] * 3
    _, clear = choice(monkeypatch, True, (0.4, 0.4, 0.2, 0.4))
    assert clear == [*NAMES], "nothing is left to compare with"


def test_the_usual_precision_is_what_the_processor_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX-512 without bf16 instructions has kernels for bf16, which are no faster than those of fp32."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for amx, avx, expected in ((True, False, True), (False, True, True), (False, False, False)):
        capabilities = {"amx_bf16": amx, "avx512_bf16": avx, "avx512_f": True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert multiplies_bf16(CPU) is expected
    assert multiplies_bf16(torch.device("cuda"))
    assert candidates(TrainConfig(precision="fp16"), torch.device("cuda"))[1].autocast == "float16"


def test_a_single_candidate_is_not_timed() -> None:
    def make_step(option: Precision) -> Callable[[], None]:
        raise AssertionError("timed")

    times = time_options([Precision()], Precision(), make_step, CPU)
    assert choose_option(times, Precision()) == Precision()


@pytest.mark.parametrize(
    ("lasts", "first", "later"), [([0.5, 0.2, 0.02, 0.1], 0.5, 0.1), ([9.0, 4.0], 9.0, 4.0)]
)
def test_a_long_step_is_timed_once_after_the_first(
    monkeypatch: pytest.MonkeyPatch, lasts: list[float], first: float, later: float
) -> None:
    """A large network on a slow machine is not kept waiting for what one step already tells."""
    now = 0.0

    def step() -> None:
        nonlocal now
        now += lasts.pop(0)

    monkeypatch.setattr("train.engine.autotune.time.perf_counter", lambda: now)
    assert time_step(step, CPU) == pytest.approx((first, later))
    assert lasts == []


def test_the_note_on_compiling_has_when_it_pays() -> None:
    pays = compile_note(0.4, 60.0, 0.3, 100)
    assert all(number in pays for number in ("60 s", "0.300", "0.400", " 6.0 epochs"))
    assert not pays.startswith("warning")
    assert compile_note(0.3, 60.0, 0.4, 100).startswith("warning: ")

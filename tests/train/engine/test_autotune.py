"""Number format, layout and compilation: a clearly faster one is taken, and noise decides nothing."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from train_data import CPU, ONE, linear_model, settings

from train.config import TrainConfig
from train.data.sampler import EpochPlan
from train.distributed import Ranks
from train.engine.autotune import (
    ROUNDS,
    bf16_warning,
    candidates,
    choose_compiled,
    choose_option,
    choose_precision,
    cpu_has_bf16,
    emulates_bf16,
    multiplies_bf16,
    time_options,
    time_step,
)
from train.engine.loss import Criterion
from train.engine.state import CACHE_VARIABLE, TrainState, build_state
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
    monkeypatch.setattr("train.engine.autotune.cpu_has_bf16", lambda: True)
    assert [str(option) for option in candidates(TrainConfig(**settings), CPU)[0]] == names


@pytest.mark.parametrize(
    ("precision", "names"), [("auto", ["tf32", "bf16"]), ("tf32", ["tf32"]), ("fp32", ["fp32"])]
)
def test_float32_of_a_gpu_is_named_tf32_unless_it_is_not(
    precision: Any, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    options, _ = candidates(TrainConfig(precision=precision, channels_last=True), torch.device("cuda"))
    assert [str(option) for option in options] == [f"{name}, channels_last" for name in names]


def test_what_the_processor_only_emulates_is_no_candidate_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of emulated bf16 can take a minute."""
    monkeypatch.setattr("train.engine.autotune.cpu_has_bf16", lambda: False)
    assert [str(o) for o in candidates(TrainConfig(), CPU)[0]] == [
        "fp32, channels_last",
        "fp32, contiguous",
    ]
    given, _ = candidates(TrainConfig(precision="bf16", channels_last=True), CPU)
    assert [str(option) for option in given] == ["bf16, channels_last"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("emulated", [True, False])
def test_a_resumed_run_whose_device_emulates_bf16_is_warned_of(
    device: str, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have begun on another machine."""
    monkeypatch.setattr("train.engine.autotune.cpu_has_bf16", lambda: not emulated)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not emulated)
    assert emulates_bf16(torch.device(device)) == emulated
    assert bool(bf16_warning(Precision("bfloat16"), torch.device(device))) == emulated
    assert not bf16_warning(Precision(), torch.device(device))


def test_bf16_is_a_candidate_where_the_kernels_are() -> None:
    capable = {"avx512_bf16", "amx_bf16", "bf16"}
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else capable
    if capable & flags:
        assert cpu_has_bf16()


NAMES = ("fp32, channels_last", "fp32, contiguous", "bf16, channels_last", "bf16, contiguous")


def choice(monkeypatch: pytest.MonkeyPatch, bf16: bool, *rounds: tuple[float, ...]) -> str:
    """Return what is taken where steps last so long in each round, by NAMES."""
    monkeypatch.setattr("train.engine.autotune.cpu_has_bf16", lambda: True)
    monkeypatch.setattr("train.engine.autotune.multiplies_bf16", lambda device: bf16)
    timed: list[str] = []

    def measure(step: str, device: torch.device) -> float:
        number = timed.count(step)
        timed.append(step)
        return rounds[min(number, len(rounds) - 1)][NAMES.index(step)]

    monkeypatch.setattr("train.engine.autotune.time_step", measure)
    options, default = candidates(TrainConfig(), CPU)
    taken = choose_option(time_options(options, str, CPU), default)  # type: ignore[arg-type]
    assert timed == [*NAMES] * ROUNDS, "in turn"
    return str(taken)


QUIET = (0.40, 0.41, 0.20, 0.21)


@pytest.mark.parametrize(
    ("bf16", "rounds", "taken"),
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
    monkeypatch: pytest.MonkeyPatch, bf16: bool, rounds: list[tuple[float, ...]], taken: str
) -> None:
    """Not the winner of noise: the same machine takes the same one, busy or not."""
    assert choice(monkeypatch, bf16, *rounds) == taken


def test_an_option_that_takes_minutes_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def measure(step: str, device: torch.device) -> float:
        timed.append(step)
        return 90.0 if "bf16" in step else 0.2

    monkeypatch.setattr("train.engine.autotune.time_step", measure)
    options = [Precision(), Precision("bfloat16")]
    time_options(options, str, CPU)  # type: ignore[arg-type]
    assert timed.count(NAMES[0]) == ROUNDS
    assert timed.count(NAMES[2]) == 1


def test_the_usual_precision_is_what_the_processor_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX-512 without bf16 instructions has kernels for bf16, which are no faster than those of fp32."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for amx, avx, expected in ((True, False, True), (False, True, True), (False, False, False)):
        capabilities = {"amx_bf16": amx, "avx512_bf16": avx, "avx512_f": True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert multiplies_bf16(CPU) is expected
    assert multiplies_bf16(torch.device("cuda"))
    assert candidates(TrainConfig(precision="fp16"), torch.device("cuda"))[1].autocast == "float16"


def test_a_step_is_timed_after_one_that_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lasts = 0.0, [9.0, 4.0]

    def step() -> None:
        nonlocal now
        now += lasts.pop(0)

    monkeypatch.setattr("train.engine.launch.time.perf_counter", lambda: now)
    assert time_step(step, CPU) == pytest.approx(4.0)


def chosen(tmp_path: Path, ranks: Ranks = ONE, **changes: Any) -> tuple[str, str]:
    """Return the precision of a small model, and what was logged."""
    config, lines = settings(tmp_path, **changes), []
    model, criterion, plan = linear_model(), Criterion(0.0), EpochPlan(8, 4, 0)
    precision = choose_precision(config, model, criterion, plan, 2, ranks, CPU, lines.append)
    return str(precision), "\n".join(lines)


def test_a_single_candidate_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("train.engine.autotune.time_step")
    assert chosen(tmp_path, precision="fp32", channels_last=True) == (NAMES[0], "")


def test_options_are_listed_with_their_seconds(tmp_path: Path) -> None:
    taken, printed = chosen(tmp_path, precision="fp32")
    assert all(f"{name} 0." in printed for name in NAMES[:2])
    assert printed.startswith(f"precision {taken}, ")


ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def limit_memory(monkeypatch: pytest.MonkeyPatch, ranks: Ranks, *large: str) -> None:
    """Give the last rank too little memory for some number formats."""
    forward = TrainState.forward

    def limited(self: TrainState, images: torch.Tensor) -> Any:
        if ranks.rank == ranks.world_size - 1 and str(self.precision).split(",")[0] in large:
            raise ERROR
        return forward(self, images)

    monkeypatch.setattr(TrainState, "forward", limited)
    monkeypatch.setattr("train.engine.autotune.cpu_has_bf16", lambda: True)
    monkeypatch.setattr("train.engine.autotune.multiplies_bf16", lambda device: False)


def chosen_beside_a_small_rank(ranks: Ranks) -> str:
    with pytest.MonkeyPatch.context() as monkeypatch:
        limit_memory(monkeypatch, ranks, "fp32")
        return chosen(Path(), ranks, precision="auto")[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_option_that_is_out_of_memory_on_one_rank_is_taken_by_none(
    world_size: int, tmp_path: Path
) -> None:
    if world_size == 1:
        taken = [chosen_beside_a_small_rank(ONE)]
    else:
        taken = on_ranks(chosen_beside_a_small_rank, world_size, tmp_path)
    assert all(name.startswith("bf16") for name in taken)
    assert len(set(taken)) == 1


def test_all_options_out_of_memory_is_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(monkeypatch, ONE, "fp32", "bf16")
    with pytest.raises(torch.OutOfMemoryError):
        chosen(tmp_path, precision="auto")


def test_a_bug_in_a_step_is_no_slow_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_autotune.ERROR", RuntimeError("shapes cannot be multiplied"))
    limit_memory(monkeypatch, ONE, "fp32")
    with pytest.raises(RuntimeError, match="shapes"):
        chosen(tmp_path, precision="auto")


def test_a_network_that_cannot_be_compiled_is_an_error_that_names_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: object, dynamic: bool) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", refused)
    with pytest.raises(ValueError, match=r"--compile.*no compiler"):
        chosen(tmp_path, precision="fp32", channels_last=True, compile=True)


@pytest.mark.parametrize(("compiled", "pays"), [(0.3, True), (0.5, False)])
def test_compiling_that_does_not_pay_is_warned_of(
    compiled: float, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [1.0, 0.4, 60.0, compiled]
    monkeypatch.setattr("train.engine.autotune.seconds_of", lambda *_: seconds.pop(0))
    taken, printed = chosen(tmp_path, precision="fp32", channels_last=True, compile=True)
    assert taken == f"{NAMES[0]}, compiled"
    assert all(number in printed for number in ("60", "0.400", f"{compiled:.3f}"))
    assert printed.startswith("warning: --compile") != pays


PLAN = EpochPlan(1280, 128, 0)  # 10 steps an epoch


@pytest.fixture(autouse=True)
def _no_folder_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")  # so that it is removed again after the test
    monkeypatch.delenv(CACHE_VARIABLE)


def compiled_by_timing(
    monkeypatch: pytest.MonkeyPatch, plain: float, first: float, compiled: float | Exception, **changes: Any
) -> tuple[bool, str]:
    """Return what is decided where steps last so long, and what was printed."""
    timed = {False: [9.0, plain], True: [first, compiled]}

    def seconds(step: Any, device: torch.device) -> float:
        value = timed[step].pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr("train.engine.autotune.seconds_of", seconds)
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
    taken, printed = compiled_by_timing(monkeypatch, plain, first, compiled, **changes)
    assert taken == expected
    assert bool(printed) == (changes.get("compile") is not False)
    assert not isinstance(compiled, Exception) or "no compiler" in printed


def one_rank_fails(ranks: Ranks) -> bool:
    with pytest.MonkeyPatch.context() as monkeypatch:
        compiled = RuntimeError("no compiler") if ranks.rank else 0.1
        return compiled_by_timing(monkeypatch, 0.4, 60.0, compiled)[0]


def test_a_rank_that_cannot_compile_decides_for_all(tmp_path: Path) -> None:
    assert on_ranks(one_rank_fails, 2, tmp_path) == [False, False]


def test_too_little_memory_for_what_is_required_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        compiled_by_timing(monkeypatch, 0.4, 60.0, torch.OutOfMemoryError("out of memory"), compile=True)


def test_what_is_compiled_is_kept_below_the_output_unless_the_user_chose_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a resumed run, which times nothing."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: None)
    for folder in (tmp_path, tmp_path / "other"):  # the second finds the variable set
        config = TrainConfig(output=str(folder), compile=True)
        build_state(config, linear_model(), 1, Precision(), ONE, CPU)
        assert os.environ[CACHE_VARIABLE] == str(tmp_path / ".cache" / "inductor")


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

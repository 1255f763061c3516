"""Device, threads and number format: what is asked for is what is used."""

from pathlib import Path

import joblib
import pytest
import torch
from forked import execute, fork
from train_data import CPU

from train.config import TrainConfig
from train.distributed import Ranks
from train.engine.device import (
    candidates,
    choose_device,
    choose_precision,
    choose_workers,
    compile_note,
    default_option,
    has_bf16,
    multiplies_bf16,
    time_step,
)
from train.precision import Precision

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@no_gpu
def test_cuda_without_a_gpu_is_an_error() -> None:
    with pytest.raises(ValueError, match="--device cuda, but torch sees no CUDA device; use --device cpu"):
        choose_device(TrainConfig(device="cuda"), Ranks())


@no_gpu
def test_auto_takes_the_cpu_without_a_gpu_and_refuses_fp16() -> None:
    assert choose_device(TrainConfig(), Ranks()) == CPU
    with pytest.raises(ValueError, match="--precision fp16 is for CUDA; on the CPU use bf16 or fp32"):
        choose_device(TrainConfig(precision="fp16"), Ranks())


def test_cpu_is_the_cpu() -> None:
    assert choose_device(TrainConfig(device="cpu"), Ranks()) == CPU


def test_more_processes_than_gpus_is_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes on this machine and 2 CUDA devices"):
        choose_device(TrainConfig(), Ranks(0, 0, 4, 4))


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
    monkeypatch.setattr("train.engine.device.has_bf16", lambda: True)
    assert [str(option) for option in candidates(TrainConfig(**settings), CPU)] == names


def test_what_the_processor_only_emulates_is_no_candidate_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of emulated bf16 can take a minute."""
    monkeypatch.setattr("train.engine.device.has_bf16", lambda: False)
    assert [str(o) for o in candidates(TrainConfig(), CPU)] == ["fp32, channels_last", "fp32, contiguous"]
    asked = candidates(TrainConfig(precision="bf16", channels_last=True), CPU)
    assert [str(option) for option in asked] == ["bf16, channels_last"]


def test_bf16_is_a_candidate_where_the_kernels_are() -> None:
    capable = {"avx512_bf16", "amx_bf16", "bf16"}
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else capable
    if capable & flags:
        assert has_bf16()


NAMES = ("fp32, channels_last", "fp32, contiguous", "bf16, channels_last", "bf16, contiguous")


def choice(monkeypatch: pytest.MonkeyPatch, bf16: bool, *turns: tuple[float, ...]) -> tuple[str, list[str]]:
    """(what is taken, what was timed in what order) where the steps of each turn last so long, by NAMES."""
    monkeypatch.setattr("train.engine.device.has_bf16", lambda: True)
    timed: list[str] = []

    def measure(step: str, device: torch.device, most: int) -> tuple[float, float]:
        turn = timed.count(step)
        timed.append(step)
        return 9.0, turns[min(turn, len(turns) - 1)][NAMES.index(step)]

    monkeypatch.setattr("train.engine.device.time_step", measure)
    options = candidates(TrainConfig(), CPU)
    chosen, seconds = choose_precision(options, default_option(options, bf16), str, CPU)  # type: ignore[arg-type]
    assert tuple(seconds) == NAMES
    return str(chosen), timed


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
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert multiplies_bf16(CPU) is expected
    assert multiplies_bf16(torch.device("cuda"))
    fp32, fp16 = Precision(""), Precision("float16")
    assert default_option([fp32, fp16], bf16=True) == fp32


def test_a_single_candidate_is_not_timed() -> None:
    def make_step(option: Precision):
        raise AssertionError("timed")

    assert choose_precision([Precision()], Precision(), make_step, CPU) == (Precision(), {})


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

    monkeypatch.setattr("train.engine.device.time.perf_counter", lambda: now)
    assert time_step(step, CPU) == pytest.approx((first, later))
    assert lasts == []


@pytest.mark.parametrize(
    ("processors", "ranks", "device", "workers"),
    [(2, 1, "cpu", 0), (2, 4, "cpu", 0), (16, 1, "cpu", 4), (64, 4, "cpu", 4), (128, 1, "cpu", 8)]
    + [(2, 1, "cuda", 1), (8, 1, "cuda", 7), (64, 4, "cuda", 8), (4, 8, "cuda", 1)],
)
def test_loader_processes_follow_the_processors(
    monkeypatch: pytest.MonkeyPatch, processors: int, ranks: int, device: str, workers: int
) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda: processors)
    local = Ranks(0, 0, ranks, ranks)
    assert choose_workers(TrainConfig(), local, torch.device(device)) == workers
    assert choose_workers(TrainConfig(num_workers=3), local, torch.device(device)) == 3


THREADS = """
import joblib, torch
joblib.cpu_count = lambda: 8
from train.config import TrainConfig
from train.engine.device import configure
from train.distributed import Ranks
for deterministic in (True, False):
    config = TrainConfig(deterministic=deterministic)
    for workers in (0, 1):
        for n in (1, 2, 4, 16):
            configure(config, Ranks(0, 0, n, n), torch.device("cpu"), workers)
            print(torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
"""


def test_the_ranks_of_a_machine_divide_its_processors(tmp_path: Path) -> None:
    process = fork(execute, THREADS, [], cwd=tmp_path, log=tmp_path / "log")
    process.join(60)
    threads = [8, 4, 2, 1, 7, 3, 1, 1]
    assert (tmp_path / "log").read_text().split() == [
        word for on in ("True", "False") for n in threads for word in (str(n), on)
    ]


def test_what_compiling_is_worth_is_said() -> None:
    assert compile_note(0.4, 60.0, 0.3, 100) == (
        "compiled in 60 s: 0.300 s a step, 0.400 without: it pays after 6.0 epochs of each image size"
    )
    assert "it does not pay here, leave --compile out" in compile_note(0.3, 60.0, 0.4, 100)

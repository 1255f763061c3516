"""Choice of number format and memory layout: the fastest one, where the settings leave it open."""

import copy
import platform
import time
from collections.abc import Callable
from statistics import median

import torch

from serve.contract.errors import UserError
from train.config import TrainConfig
from train.data.sampler import EpochPlan
from train.distributed import Log, Ranks, max_over_ranks, on_main
from train.engine.loss import Criterion
from train.engine.state import build_state
from train.models.classifier import ImageClassifier
from train.precision import Precision

TIMED_STEPS = 3
LONG_STEP_SECONDS = 1.0  # one such step is timed truly enough
ROUNDS, ROUNDS_OF_LONG_STEPS = 5, 3  # in which all options are timed one after the other
CLEARLY_BETTER = 0.9  # of the default's seconds, which other work on the machine does not explain
MIN_WINS = 0.8  # share of the rounds in which an option must be so much better
HOPELESS = 1.5  # times the default's seconds in the first round

Step = Callable[[], None]


def choose_precision(
    config: TrainConfig,
    model: ImageClassifier,
    criterion: Criterion,
    plan: EpochPlan,
    num_classes: int,
    ranks: Ranks,
    device: torch.device,
    log: Log,
) -> Precision:
    """Time whole training steps on copies of the model, and log the seconds and what compiling is worth.

    Raises:
        UserError: the network cannot be compiled.
    """
    size = config.input_size(config.image_size)
    images = torch.zeros(plan.micro_batch_size, size, size, 3, dtype=torch.uint8).to(device)
    targets = torch.full((plan.micro_batch_size, num_classes), 1 / num_classes, device=device)

    def make_step(precision: Precision, compiled: bool = False) -> Step:
        timed = config.replace(compile=compiled)
        state = build_state(timed, copy.deepcopy(model), 1, precision, ranks, device)
        state.model.train()

        def step() -> None:
            state.backward(criterion(state.forward(images), targets).mean())
            state.update(config.clip_grad)

        return step

    if config.precision == "bf16" and device.type == "cpu" and not has_bf16():
        log("warning: this processor has no bf16 arithmetic and emulates it; --precision fp32 is faster")
    options, default = on_main(ranks, lambda: candidates(config, device))  # nodes may have other processors
    seconds = time_options(options, default, make_step, device)
    precision = choose_option(seconds, default)
    if len(options) > 1:
        listed = "; ".join(f"{option} {median(times):.3f}" for option, times in seconds.items())
        log(f"seconds a step: {listed}. Taken: {precision}")
    if config.compile:
        plain = median(seconds[precision] or [time_step(make_step(precision), device)[1]])
        try:
            first, compiled = time_step(make_step(precision, compiled=True), device)
        except Exception as error:  # the compiler's and its backends' share no base
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"--compile: {config.model} cannot be compiled here ({reason}); leave it out"
            ) from error
        log(compile_note(plain, first, compiled, plan.steps))
    return precision


def candidates(config: TrainConfig, device: torch.device) -> tuple[list[Precision], Precision]:
    """Return the options that the settings leave, most faithful first, and the default among them: bf16 on
    a device that has instructions for it, else fp32."""
    if config.precision != "auto":
        dtypes = [{"fp32": "", "bf16": "bfloat16", "fp16": "float16"}[config.precision]]
    elif config.deterministic:
        dtypes = [""]  # a timing must not decide a result
    elif device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes = ["", "float16"]
    elif device.type == "cpu" and not has_bf16():
        dtypes = [""]
    else:
        dtypes = ["", "bfloat16"]
    if config.channels_last is not None:
        formats = [config.channels_last]
    else:
        formats = [True] if config.deterministic else [True, False]
    options = [Precision(dtype, channels_last) for dtype in dtypes for channels_last in formats]
    usual = "bfloat16" if multiplies_bf16(device) else ""
    return options, next((option for option in options if option.autocast == usual), options[0])


def has_bf16() -> bool:
    """Return whether the processor has kernels for bf16; emulated, a step can take minutes."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # no public function knows


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions for bf16. On x86 that is more than `has_bf16`, for which
    AVX-512 is enough."""
    if device.type == "cuda" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def time_options(
    options: list[Precision],
    default: Precision,
    make_step: Callable[[Precision], Step],
    device: torch.device,
) -> dict[Precision, list[float]]:
    """Return seconds a step of each option in each round, on the slowest rank; none for a single option.

    The options take turns, so that other work on the machine meets all of them, and one copy of the model
    is in memory at a time. An option that is hopeless in the first round is timed no more.
    """
    times: dict[Precision, list[float]] = {option: [] for option in options}
    timed, rounds = options, ROUNDS if len(options) > 1 else 0
    while len(times[default]) < rounds:
        for option in timed:
            times[option].append(time_step(make_step(option), device, 1)[1])
        first = times[default][0]
        timed = [option for option in timed if times[option][0] < HOPELESS * first]
        rounds = ROUNDS_OF_LONG_STEPS if first >= LONG_STEP_SECONDS else ROUNDS
        if timed == [default]:
            break
    return times


def choose_option(times: dict[Precision, list[float]], default: Precision) -> Precision:
    """Return the fastest of the options that are clearly faster than the default in most rounds, or else
    the default."""
    best = default
    for option, seconds in times.items():
        wins = sum(own < CLEARLY_BETTER * its for own, its in zip(seconds, times[default], strict=False))
        if not seconds or wins < MIN_WINS * len(times[default]):
            continue
        limit = min(CLEARLY_BETTER * median(times[default]), median(times[best]))
        if median(seconds) < limit:
            best = option
    return best


def time_step(step: Step, device: torch.device, max_steps: int = TIMED_STEPS) -> tuple[float, float]:
    """Return seconds of the first call, with allocation, kernel selection and compilation, and of a later
    one. Every rank takes part, since the ranks share processors and must agree."""

    def once() -> float:
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        return max_over_ranks(time.perf_counter() - started)

    first = once()
    times = [once()]
    while times[0] < LONG_STEP_SECONDS and len(times) < max_steps:
        times.append(once())
    return first, median(times)


def compile_note(plain: float, first: float, compiled: float, steps_per_epoch: int) -> str:
    """Return a line on when compiling pays, from seconds a step."""
    note = f"compiled in {first:.0f} s: {compiled:.3f} s a step, {plain:.3f} without: "
    if compiled >= plain:
        return f"warning: {note}it does not pay here, leave --compile out"
    epochs = first / (plain - compiled) / steps_per_epoch
    return f"{note}it pays after {epochs:.1f} epochs of each image size"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Choice of number format, memory layout and compilation by timing steps, as far as settings leave it."""

import copy
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch

from serve.contract.errors import UserError
from train.config import TrainConfig
from train.data.sampler import EpochPlan
from train.data.workers import first_line
from train.distributed import Log, Ranks, max_over_ranks, on_main
from train.engine.device import is_out_of_memory, uses_tf32
from train.engine.launch import Step, check_launching, seconds_of
from train.engine.loss import Criterion
from train.engine.state import TrainState, build_state
from train.models.classifier import ImageClassifier
from train.precision import Precision

ROUNDS = 3  # in which the options take turns, so that other work on the machine meets all of them
TIMED_IMAGES = 32  # of a step on a CPU: the options differ by the same factor, and the start is sooner
HOPELESS = 4.0  # times the fastest seconds, which no other work explains: such an option is timed once
CLEARLY_FASTER = 0.9  # of the default's seconds; less may be noise
USUAL_SECONDS = 60.0  # of compiling a network
MOST_GAINED = 0.3  # of a step's time, by compiling it


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
    """Time whole training steps on copies of the model, and return the default or a clearly faster option;
    print whether a GPU waits for the host in each step.

    Raises:
        UserError: the network cannot be compiled.
        torch.OutOfMemoryError: no option has enough memory.
    """
    size = config.input_size(config.image_size)
    # on the device at once: an absurd batch is then out of its memory, and not of the host's
    images = torch.zeros(plan.micro_batch_size, size, size, 3, dtype=torch.uint8, device=device)
    targets = torch.full((plan.micro_batch_size, num_classes), 1 / num_classes, device=device)

    def make_step(
        precision: Precision, compiled: bool = False, batch_size: int = plan.micro_batch_size
    ) -> Step:
        """Without the other ranks: they would wait for the gradients of one that cannot do it."""
        timed = config.replace(compile=compiled)
        state: TrainState | None = None

        def step() -> None:
            nonlocal state
            if state is None:
                state = build_state(timed, copy.deepcopy(model), 1, precision, Ranks(), device)
                state.model.train()
            state.backward(criterion(state.forward(images[:batch_size]), targets[:batch_size]).mean())
            state.update(config.clip_grad)

        return step

    if config.precision == "bf16" and (warning := bf16_warning(Precision("bfloat16"), device)):
        log(warning)
    options, default = on_main(ranks, lambda: candidates(config, device))  # nodes may have other processors
    if len(options) > 1:
        most = TIMED_IMAGES if device.type == "cpu" else math.inf  # a GPU has to hold the whole batch
        timed_images = int(min(plan.micro_batch_size, most))
        seconds = time_options(options, partial(make_step, batch_size=timed_images), device)
        listed = "; ".join(f"{option} {time:.3f}" for option, time in seconds.items())
        default = choose_option(seconds, default)
        log(f"precision {default}, as timed in seconds a step of {timed_images} images: {listed}")
        if seconds[default] == math.inf:
            raise torch.OutOfMemoryError("no number format and memory layout has enough memory")

    @lru_cache(1)  # compiling takes long, and each holds a copy of the model
    def step_of(compiled: bool) -> Step:
        return make_step(default, compiled)

    compiled = choose_compiled(config, plan, step_of, device, log)
    if device.type == "cuda":
        check_launching(step_of(compiled), device, log)
    return replace(default, compiled=compiled)


def candidates(config: TrainConfig, device: torch.device) -> tuple[list[Precision], Precision]:
    """Return the options that the settings leave, most faithful first, and the default among them: bf16 on
    a device that has instructions for it, else fp32."""
    if config.precision != "auto":
        dtypes = [{"fp32": "", "tf32": "", "bf16": "bfloat16", "fp16": "float16"}[config.precision]]
    elif config.deterministic:
        dtypes = [""]  # a timing must not decide a result
    elif emulates_bf16(device):
        dtypes = ["", "float16"] if device.type == "cuda" else [""]
    else:
        dtypes = ["", "bfloat16"]
    if config.channels_last is not None:
        formats = [config.channels_last]
    else:
        formats = [True] if config.deterministic else [True, False]
    tf32 = uses_tf32(config, device)
    options = [Precision(dtype, layout, tf32=tf32) for dtype in dtypes for layout in formats]
    usual = "bfloat16" if multiplies_bf16(device) else ""
    return options, next((option for option in options if option.autocast == usual), options[0])


def cpu_has_bf16() -> bool:
    """Return whether the processor has kernels for bf16; emulated, a step can take minutes."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # no public function knows


def emulates_bf16(device: torch.device) -> bool:
    """Return whether bf16 is computed by instructions for other numbers."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return not cpu_has_bf16()


def bf16_warning(precision: Precision, device: torch.device) -> str:
    """Return a warning if a run computes in bf16 and the device emulates it, else ""."""
    if precision.autocast != "bfloat16" or not emulates_bf16(device):
        return ""
    return (
        "warning: this device has no bf16 arithmetic and emulates it; a run with --precision fp32 is "
        "faster (a resumed one keeps its precision)"
    )


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions for bf16. On x86 that is more than `cpu_has_bf16`:
    AVX-512 is enough for it."""
    if device.type == "cuda" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def time_options(
    options: list[Precision], make_step: Callable[[Precision], Step], device: torch.device
) -> dict[Precision, float]:
    """Return the seconds of each option's fastest step, infinity where a rank was out of memory. One copy
    of the model is in memory at a time."""
    seconds: dict[Precision, list[float]] = {option: [] for option in options}
    for option in options * ROUNDS:
        first = [taken[0] for taken in seconds.values() if taken]
        if not seconds[option] or seconds[option][0] < HOPELESS * min(first):
            seconds[option].append(time_step(make_step(option), device))
    return {option: max(taken) if math.inf in taken else min(taken) for option, taken in seconds.items()}


def choose_option(seconds: dict[Precision, float], default: Precision) -> Precision:
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[fastest] < CLEARLY_FASTER * seconds[default] else default


def time_step(step: Step, device: torch.device) -> float:
    """Return the seconds of a step on the slowest rank, as the ranks share processors and must agree, after
    one that allocates; infinity where a rank is out of memory. The step must not communicate."""
    try:
        seconds_of(step, device)
        seconds = seconds_of(step, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        seconds = math.inf
    return max_over_ranks(seconds)


def is_compile_error(error: Exception) -> bool:
    """Return whether torch.compile or one of its backends raised it."""
    module = sys.modules.get("torch._dynamo.exc")  # seconds to import, and loaded if anything was compiled
    return module is not None and isinstance(error, module.TorchDynamoException)


def choose_compiled(
    config: TrainConfig,
    plan: EpochPlan,
    make_step: Callable[[bool], Step],
    device: torch.device,
    log: Log,
) -> bool:
    """Return whether the network is compiled in the run; every rank must call it.

    `--compile auto` tries it where the steps of the run are enough to gain what compiling usually takes.

    Args:
        make_step: compiled or not -> a training step, which must not communicate.

    Raises:
        UserError: --compile, and the network cannot be compiled.
        torch.OutOfMemoryError: --compile, and there is too little memory.
    """
    if not config.compile:
        return False
    automatic = config.compile == "auto"
    if automatic and config.deterministic:
        log("warning: --compile auto has no effect with --deterministic: a timing must not decide a result")
        return False
    steps = plan.steps * min(config.epochs, config.stop_after or config.epochs)
    plain = time_step(make_step(False), device)
    if automatic and MOST_GAINED * plain * steps <= USUAL_SECONDS:
        log(f"not compiled (--compile auto): {steps} steps of {plain:.3f} s are too few for it to pay")
        return False
    reason, mine = "", (math.inf, math.inf)
    try:
        step = make_step(True)
        mine = seconds_of(step, device), seconds_of(step, device)  # the first with compilation
    except Exception as error:  # the compiler's and its backends' share no base
        if is_out_of_memory(error) and not automatic:
            raise
        reason = f" ({first_line(error)})"
    first, compiled = map(max_over_ranks, mine)
    if compiled == math.inf:
        why = f"{config.model} cannot be compiled on this machine{reason}"
        if not automatic:
            raise UserError(f"--compile: {why}; leave it out")
        log(f"warning: not compiled (--compile auto): {why}")
        return False
    taken = not automatic or (plain - compiled) * steps > first
    warning = "warning: --compile does not pay: " if taken and compiled >= plain else ""
    choice = "compiled" if taken else "not compiled, it does not pay"
    log(f"{warning}{choice}: {compiled:.3f} s a step, {plain:.3f} s without; compiling took {first:.0f} s")
    return taken

"""Compiling of the network: whether it can be done on this machine, and whether that pays."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from serve.contract.errors import UserError
from train.config import TrainConfig
from train.data.sampler import EpochPlan
from train.data.workers import first_line
from train.distributed import Log, max_over_ranks
from train.engine.device import is_out_of_memory
from train.engine.launch import Step, seconds_of

USUAL_SECONDS = 60.0  # of compiling a network
MOST_GAINED = 0.3  # of a step's time, by compiling it
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


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
    # what is compiled is kept for later starts, unless the user has chosen a folder
    os.environ.setdefault(CACHE_VARIABLE, str(Path(config.output, ".cache", "inductor").resolve()))
    automatic = config.compile == "auto"
    if automatic and config.deterministic:
        log("warning: --compile auto has no effect with --deterministic: a timing must not decide a result")
        return False
    steps = plan.steps * min(config.epochs, config.stop_after or config.epochs)
    plain = max_over_ranks(time_both(make_step(False), device)[1])
    if automatic and MOST_GAINED * plain * steps <= USUAL_SECONDS:
        log(f"not compiled (--compile auto): {steps} steps of {plain:.3f} s are too few for it to pay")
        return False
    reason, mine = "", (math.inf, math.inf)
    try:
        mine = time_both(make_step(True), device)
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


def time_both(step: Step, device: torch.device) -> tuple[float, float]:
    """Return this rank's seconds of a step's first call, with compilation, and of the second."""
    return seconds_of(step, device), seconds_of(step, device)

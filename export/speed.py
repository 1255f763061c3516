"""How fast a model file is on a provider of this machine, timed in turn with the default, cpu:fp32."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.batch import default_batch_size
from serve.predictor import Predictor
from serve.processors import available_processors
from serve.verification import DEFAULT_PAIRING

TURNS = 5
TURN_SECONDS = 0.5


def time_pairing(file: Path, pairing: str, *others: Path) -> dict[str, float]:
    """Return the median images a second of a file on a provider, as in "openvino:bf16", and on the default;
    and of `others` on the default. Batches and threads are those of serve/main.py, which also decodes.

    The keys are "FILE PROVIDER:PRECISION". Nothing is timed when there is nothing to compare.

    Raises:
        UserError: the provider cannot be used.
    """
    wanted = dict.fromkeys(
        [(file, pairing), *((other, DEFAULT_PAIRING) for other in (file, *others) if other.is_file())]
    )
    if len(wanted) == 1:
        return {}
    predictors = {f"{path.name} {name}": _open(path, name) for path, name in wanted}
    rates: dict[str, list[float]] = {name: [] for name in predictors}
    for turn in range(TURNS + 1):  # the first one warms up
        for name, predictor in predictors.items():
            rate = _images_per_second(predictor)
            if turn:
                rates[name].append(rate)
    return {name: statistics.median(values) for name, values in rates.items()}


def _open(path: Path, pairing: str) -> Predictor:
    provider, _, precision = pairing.partition(":")
    workers = available_processors()
    return Predictor(path, provider, precision=precision, allow_unverified=True, workers=workers)


def _images_per_second(predictor: Predictor) -> float:
    size, batch_size = predictor.metadata.preprocess.size, default_batch_size(predictor)
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, size, size, 3), np.uint8)
    callers = available_processors() if predictor.provider == "cpu" else 1
    started = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        calls = [pool.submit(_batches, predictor, pixels, started + TURN_SECONDS) for _ in range(callers)]
        batches = sum(call.result() for call in calls)
    return batches * batch_size / (time.perf_counter() - started)


def _batches(predictor: Predictor, pixels: NDArray[np.uint8], deadline: float) -> int:
    """Score until then; returns how often."""
    count = 0
    while not count or time.perf_counter() < deadline:
        predictor.predict(pixels)
        count += 1
    return count

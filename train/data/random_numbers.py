"""Random numbers that are a function of their key, for a whole batch at once.

Each number is a hash of (seed, sample, position): neither the samples' order nor the process matters. The
hash is SplitMix64's finaliser, applied twice (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014).
"""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


def seed_of(purpose: str, *key: int) -> int:
    """Return a 64-bit seed that is a function of purpose and key; neighbouring keys' are unrelated."""
    entropy = (zlib.crc32(purpose.encode()), len(key), *key)  # SeedSequence takes (1,) and (1, 0) for one
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def uniforms(seed: int, samples: Sequence[int] | NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Return numbers in [0, 1), [N, count]; row i is a function of `seed_of`'s seed and samples[i] >= 0."""
    numbers = np.asarray(samples, np.int64).astype(np.uint64)[:, None]
    positions = np.arange(1, count + 1, dtype=np.uint64)[None]
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        rows = _mix(np.uint64(seed) ^ _mix((numbers + np.uint64(1)) * GAMMA))
        bits = _mix(rows + positions * GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

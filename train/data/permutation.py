"""A random-looking permutation of any size that is computed index by index, and so takes no memory."""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8  # of an alternating Feistel network; from 4 on such networks mix well (Luby and Rackoff 1988)
GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd


class Permutation:
    """`permutation[places]` for places in range(size): each index once, a function of (size, seed, place).

    An alternating Feistel network on the least number of bits that holds `size`, with keyed rounds. A value
    outside of the range is put through the network again until it is inside (cycle walking: Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002), less than once on average, since about half of
    the values or more are inside. Not for secrets: the rounds mix as hash tables do, not as a cipher.
    """

    def __init__(self, size: int, seed: int):
        assert 1 <= size <= 2**62
        bits = max(2, (size - 1).bit_length())
        self.size = size
        self.low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
        self.low_mask, self.high_mask = (
            (np.uint64(1) << width) - np.uint64(1) for width in (self.low_bits, high_bits)
        )
        self.keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)

    def __getitem__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n] in range(size) -> int64 [n]."""
        values = self._once(places.astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = self._once(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _once(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """A permutation of all values of so many bits: each round can be undone, whatever `mix` is."""
        low, high = values & self.low_mask, values >> self.low_bits
        for first, second in zip(self.keys[::2], self.keys[1::2], strict=True):
            low ^= mix(high, first) & self.low_mask
            high ^= mix(low, second) & self.high_mask
        return (high << self.low_bits) | low


def mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """64 bits, each a function of all of value and key (finaliser of SplitMix64, Steele et al. 2014)."""
    mixed = (values + key) * GAMMA
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed

"""Sampler: which samples form which batch on which rank, as a function of (seed, epoch)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError
from train.data.random_numbers import seed_of

Key = tuple[int, int, float]  # (epoch, index in the ImageSet, weight)


@dataclass(frozen=True)
class EpochPlan:
    """Batches of every epoch, each sample with weight 1 exactly once in it.

    The last batch is completed with samples of weight 0, so that all batches have one shape and every rank
    has as many. `batch_size` is that of one optimizer step, over all ranks and accumulation steps.

    Raises:
        UserError: batch_size cannot be divided by ranks and accumulation steps.
    """

    num_samples: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    def __post_init__(self) -> None:
        parts = self.world_size * self.accumulation
        if self.batch_size % parts:
            raise UserError(
                f"--batch-size {self.batch_size} is not divisible by {parts} "
                f"({self.world_size} processes x {self.accumulation} accumulation steps): give a multiple"
            )
        assert self.num_samples > 0
        assert 0 <= self.rank < self.world_size

    @property
    def steps(self) -> int:
        """Number of optimizer steps in an epoch."""
        return -(-self.num_samples // self.batch_size)

    @property
    def micro_batch_size(self) -> int:
        """Number of images in one forward pass of this rank."""
        return self.batch_size // (self.world_size * self.accumulation)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the samples' order in an epoch: a permutation of range(num_samples), 8 bytes a sample."""
        return np.random.default_rng(seed_of("order", self.seed, epoch)).permutation(self.num_samples)

    def offset(self, step: int, micro_step: int) -> int:
        """Return the position in the epoch of the first image of this rank's micro-batch."""
        part = self.rank * self.accumulation + micro_step
        return step * self.batch_size + part * self.micro_batch_size

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[list[Key]]:
        """Yield this rank's micro-batches from `first_step` on."""
        order = self.order(epoch)
        for step in range(first_step, self.steps):
            for micro_step in range(self.accumulation):
                start = self.offset(step, micro_step)
                positions = np.arange(start, start + self.micro_batch_size)
                indices = order[positions % self.num_samples].tolist()
                weights = (positions < self.num_samples).astype(float).tolist()
                yield [(epoch, index, weight) for index, weight in zip(indices, weights, strict=True)]

    def samples(self, epoch: int, step: int) -> list[int]:
        """Return the indices of the samples of weight 1 in a step's batch, of all ranks."""
        start = step * self.batch_size
        samples: list[int] = self.order(epoch)[start : start + self.batch_size].tolist()
        return samples

    def real_size(self, step: int) -> int:
        """Return the number of samples of weight 1 in a step's batch, of all ranks."""
        return min(self.batch_size, self.num_samples - step * self.batch_size)


def evaluation_batches(
    num_samples: int, batch_size: int, rank: int, world_size: int
) -> Iterator[list[Key]]:
    """Yield this rank's batches: every sample once over all ranks, without padding, for exact sums."""
    mine = range(rank, num_samples, world_size)
    for start in range(0, len(mine), batch_size):
        yield [(0, index, 1.0) for index in mine[start : start + batch_size]]

"""The epoch plan: every sample exactly once, with any number of processes and after any resume."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.sampler import EpochPlan, Key, evaluation_batches


def plans(num_samples: int, batch_size: int, world_size: int, accumulation: int = 1, seed: int = 0):
    return [
        EpochPlan(num_samples, batch_size, seed, rank, world_size, accumulation)
        for rank in range(world_size)
    ]


def step_batches(ranks: list[EpochPlan], epoch: int, first_step: int = 0) -> list[list[Key]]:
    """Return the whole batch of each step, put together from the micro-batches of all ranks in order."""
    parts = [list(plan.batches(epoch, first_step)) for plan in ranks]
    n = ranks[0].accumulation
    return [
        [key for part in parts for micro in part[step * n : (step + 1) * n] for key in micro]
        for step in range(len(parts[0]) // n)
    ]


sizes = st.tuples(
    st.integers(1, 200), st.integers(1, 7), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 3])
)


@given(sizes, st.integers(0, 3), st.data())
@settings(max_examples=200, deadline=None)
def test_every_sample_counts_exactly_once_in_an_epoch(
    sizes: tuple[int, int, int, int], epoch: int, data: st.DataObject
) -> None:
    num_samples, micro, world_size, accumulation = sizes
    ranks = plans(num_samples, micro * world_size * accumulation, world_size, accumulation)
    first_step = data.draw(st.integers(0, ranks[0].steps))
    skipped = step_batches(ranks, epoch)[:first_step]
    resumed = step_batches(ranks, epoch, first_step)
    seen = [index for batch in skipped + resumed for _, index, weight in batch if weight == 1]
    assert sorted(seen) == list(range(num_samples))
    assert all(weight in (0, 1) for batch in resumed for _, _, weight in batch)


@given(sizes)
@settings(max_examples=100, deadline=None)
def test_no_rank_is_ever_without_work_and_all_batches_have_one_shape(
    sizes: tuple[int, int, int, int],
) -> None:
    num_samples, micro, world_size, accumulation = sizes
    for plan in plans(num_samples, micro * world_size * accumulation, world_size, accumulation):
        batches = list(plan.batches(0))
        assert len(batches) == plan.steps * accumulation
        assert {len(batch) for batch in batches} == {plan.micro_batch_size}


@given(sizes)
@settings(max_examples=100, deadline=None)
def test_the_number_of_processes_cannot_change_a_steps_batch(sizes: tuple[int, int, int, int]) -> None:
    num_samples, micro, world_size, accumulation = sizes
    batch_size = micro * world_size * accumulation
    many = step_batches(plans(num_samples, batch_size, world_size, accumulation), epoch=1)
    assert many == step_batches(plans(num_samples, batch_size, 1), epoch=1)


@given(st.integers(1, 200), st.integers(1, 5), st.data())
@settings(max_examples=200, deadline=None)
def test_an_epoch_that_is_resumed_with_other_processes_again_and_again_is_the_same_epoch(
    num_samples: int, share: int, data: st.DataObject
) -> None:
    """Stopped at any steps, resumed with any number of processes and accumulation that divide the batch."""
    batch_size = 24 * share
    whole = step_batches(plans(num_samples, batch_size, 1), epoch=2)
    done: list[list[Key]] = []
    while len(done) < len(whole):
        world_size = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
        accumulation = data.draw(st.sampled_from([1, 2]))
        ranks = plans(num_samples, batch_size, world_size, accumulation)
        steps = data.draw(st.integers(1, len(whole) - len(done)))
        assert ranks[0].samples(2, len(done)) == [i for _, i, weight in whole[len(done)] if weight]
        done += step_batches(ranks, 2, len(done))[:steps]
    assert done == whole


@given(sizes)
@settings(max_examples=50, deadline=None)
def test_real_size_counts_the_samples_of_weight_1(sizes: tuple[int, int, int, int]) -> None:
    num_samples, micro, world_size, accumulation = sizes
    ranks = plans(num_samples, micro * world_size * accumulation, world_size, accumulation)
    for step, batch in enumerate(step_batches(ranks, 0)):
        assert ranks[0].real_size(step) == sum(weight for _, _, weight in batch)


def test_offset_is_the_position_of_a_micro_batchs_first_image() -> None:
    for plan in plans(40, 12, 2, accumulation=3):
        order = plan.order(2)
        batches = list(plan.batches(2))
        for step in range(plan.steps - 1):
            for micro_step in range(3):
                first = batches[step * 3 + micro_step][0]
                assert order[plan.offset(step, micro_step)] == first[1]


def test_the_order_differs_by_epoch_and_by_seed_and_is_reproducible() -> None:
    orders = [EpochPlan(100, 10, seed).order(epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert EpochPlan(100, 10, 2).order(2).tolist() == orders[-1]


def test_an_indivisible_batch_size_is_an_error_that_names_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"--batch-size 10\D+4\b"):
        EpochPlan(100, 10, 0, 0, world_size=2, accumulation=2)


@given(st.integers(1, 100), st.integers(1, 20), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_evaluation_takes_each_image_once_without_padding(
    num_samples: int, batch_size: int, world_size: int
) -> None:
    batches = [
        batch
        for rank in range(world_size)
        for batch in evaluation_batches(num_samples, batch_size, rank, world_size)
    ]
    assert sorted(index for batch in batches for _, index, _ in batch) == list(range(num_samples))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert {weight for batch in batches for _, _, weight in batch} == {1.0}

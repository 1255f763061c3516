"""The epoch plan and the loader: every image once, whatever the processes, workers or point of resume."""

import errno
import re
import signal
from collections.abc import Callable
from pathlib import Path
from threading import Event

import numpy as np
import psutil
import pytest
import torch
from conftest import REPOSITORY
from forked import execute, fork
from hypothesis import given, settings
from hypothesis import strategies as st
from train_data import make_data

from serve.contract.images import load_image
from train.data import reading, workers
from train.data.augment import View
from train.data.loader import (
    Batch,
    EpochPlan,
    Hang,
    Key,
    Loader,
    PixelDataset,
    evaluation_batches,
    read_pixels,
)
from train.data.pixel_cache import PixelCache, open_cache, training_entries

AUGMENTED = {"crop_scale": 0.4, "flip": 0.5, "color_jitter": 0.3, "random_erasing": 0.5}


def plans(num_samples: int, batch_size: int, world_size: int, accumulation: int = 1, seed: int = 0):
    return [
        EpochPlan(num_samples, batch_size, seed, rank, world_size, accumulation)
        for rank in range(world_size)
    ]


def step_batches(ranks: list[EpochPlan], epoch: int, first_step: int = 0) -> list[list[Key]]:
    """The whole batch of each step, put together from its micro batches, in the order of their places."""
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
def test_an_epoch_that_goes_on_with_other_processes_again_and_again_is_the_same_epoch(
    num_samples: int, share: int, data: st.DataObject
) -> None:
    """Stopped at any steps, gone on with any number of processes and accumulation that divide the batch."""
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


def test_offset_is_the_place_of_a_micro_batchs_first_image() -> None:
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
    with pytest.raises(ValueError, match=r"--batch_size 10 .* 4 \(2 processes x 2 accumulation steps\)"):
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


def load_epochs(dataset: PixelDataset, plan: EpochPlan, num_workers: int) -> list[Batch]:
    loader = Loader(dataset, num_workers, pin_memory=False)
    return [batch for epoch in range(2) for batch in loader(list(plan.batches(epoch)))]


def test_the_number_of_workers_cannot_change_a_batch(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, **AUGMENTED)
    dataset = PixelDataset(data.train, config.seed, View(config))
    plan = EpochPlan(len(data.train), 4, config.seed)
    runs = [load_epochs(dataset, plan, num_workers) for num_workers in (0, 1, 2)]
    assert len(runs[0]) == 2 * plan.steps
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
            assert torch.equal(a.indices, b.indices)
            assert torch.equal(a.weights, b.weights)


def test_a_batch_holds_pixels_labels_weights_and_indices_of_its_images(tmp_path: Path) -> None:
    config, data = make_data(tmp_path)
    loader = Loader(PixelDataset(data.train, 0, config.preprocess()), 0, pin_memory=False)
    (batch,) = loader([[(0, 3, 1.0), (0, 0, 0.0)]])
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (2, 16, 16, 3)
    assert batch.indices.tolist() == [3, 0]
    assert batch.weights.tolist() == [1.0, 0.0]
    assert batch.labels.tolist() == data.train.labels[[3, 0]].tolist()
    image = load_image((data.train.root / data.train.paths[3]).read_bytes())
    assert np.array_equal(batch.images[0].numpy(), config.preprocess()(image))


def test_an_images_view_is_that_of_its_seed_and_epoch_wherever_in_a_batch_it_is(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, **AUGMENTED)

    def views(*indices: int, seed: int = 3, epoch: int = 0) -> torch.Tensor:
        dataset = PixelDataset(data.train, seed, View(config))
        return dataset.__getitems__([(epoch, index, 1.0) for index in indices]).images

    first = views(2, 5)
    assert torch.equal(views(5, 2), first.flip(0))
    assert not torch.equal(views(2, 5, epoch=1), first)
    assert not torch.equal(views(2, 5, seed=4), first)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize(("num_workers", "harm"), [(0, Path.unlink), (1, Path.unlink), (0, cut_off)])
def test_a_file_that_vanished_or_was_damaged_counts_for_nothing_and_is_named(
    tmp_path: Path,
    num_workers: int,
    harm: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(reading, "PAUSES", (0.01,))
    config, data = make_data(tmp_path)
    gone = data.train.root / data.train.paths[2]
    harm(gone)
    loader = Loader(PixelDataset(data.train, 0, config.preprocess()), num_workers, pin_memory=False)
    for _ in range(2):
        (batch,) = loader([[(0, 2, 1.0), (0, 3, 1.0)]])
        assert batch.weights.tolist() == [0, 1]
    assert list(loader.lost) == [str(gone)]
    assert capsys.readouterr().out.count(f"{gone} was readable before training and is not now") == 1


@pytest.mark.parametrize("cached", [False, True])
def test_a_batch_that_does_not_come_is_an_error_that_names_what_was_to_be_read(
    cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.01)
    config, data = make_data(tmp_path)
    stuck = Event()
    cache = open_cache(tmp_path, data.train, training_entries(config), "on", print) if cached else None

    def read(path: Path) -> np.ndarray:  # type: ignore[type-arg]
        stuck.wait(60)
        raise OSError

    dataset = PixelDataset(data.train, 0, config.preprocess(), cache, read)
    if cached:
        monkeypatch.setattr(PixelCache, "__getitem__", lambda self, index: read(Path()))
    loader = Loader(dataset, 0, pin_memory=False, hang_seconds=0.05)
    named = str(cache.file) if cache else data.train.paths[2]
    with pytest.raises(Hang, match=re.escape(named)):
        next(loader([[(0, 2, 1.0), (0, 3, 1.0)], [(0, 0, 1.0)]]))
    monkeypatch.setattr(reading, "PAUSES", ())
    stuck.set()


def test_a_slow_batch_is_waited_for_and_who_waits_can_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.01)
    config, data = make_data(tmp_path)
    asked = Event()

    def read(path: Path) -> np.ndarray:  # type: ignore[type-arg]
        assert asked.wait(60)
        return read_pixels(path)

    loader = Loader(PixelDataset(data.train, 0, config.preprocess(), None, read), 0, False, 60.0)
    loader.while_waiting = asked.set
    (batch,) = loader([[(0, 2, 1.0)]])
    assert batch.weights.tolist() == [1]


def test_a_process_that_may_open_no_more_files_does_not_call_images_unreadable(tmp_path: Path) -> None:
    config, data = make_data(tmp_path)

    def read(path: Path) -> np.ndarray:  # type: ignore[type-arg]
        raise OSError(errno.EMFILE, "Too many open files")

    loader = Loader(PixelDataset(data.train, 0, config.preprocess(), None, read), 0, False)
    with pytest.raises(OSError, match="Too many open files"):
        next(loader([[(0, 2, 1.0)]]))
    assert not loader.lost


def test_a_process_ends_with_its_loader_processes(tmp_path: Path) -> None:
    """They ignore the signals that stop a job, and must not outlive it."""
    make_data(tmp_path)
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from train_data import make_data\n"
        "from train.data.loader import Loader, PixelDataset\n"
        "config, data = make_data(Path(sys.argv[1]))\n"
        "loader = Loader(PixelDataset(data.train, 0, config.preprocess()), 2, False)\n"
        "next(loader([[(0, 0, 1.0)], [(0, 1, 1.0)]]))\n"
        "sys.modules['kept'] = loader\n"
    )
    process = fork(execute, program, [str(tmp_path)], cwd=REPOSITORY, log=tmp_path / "log")
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "log").read_text()


def test_loader_processes_outlive_the_signals_that_stop_a_job(tmp_path: Path) -> None:
    """The batches that are under way are still needed."""
    config, data = make_data(tmp_path)
    others = set(psutil.Process().children())  # such as multiprocessing's resource tracker
    loader = Loader(PixelDataset(data.train, 0, config.preprocess()), 1, pin_memory=False)
    batches = loader([[(0, i % 4, 1.0)] for i in range(12)])
    next(batches)
    (worker,) = set(psutil.Process().children()) - others
    for number in (signal.SIGTERM, signal.SIGINT):
        worker.send_signal(number)
    assert len(list(batches)) == 11

"""The loader: the same batches with any workers, files that vanish, storage that hangs."""

import errno
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import REPOSITORY
from forked import execute, fork
from train_data import make_data, pixel_dataset, read_pixels

from serve.contract.images import load_image
from train.data import loader as loader_module
from train.data import reading, workers
from train.data.augment import ImageAugment
from train.data.loader import Batch, HangError, Loader, PixelDataset
from train.data.pixel_cache import PixelCache, open_cache, training_entries
from train.data.sampler import EpochPlan

AUGMENTED = {"crop_scale": 0.4, "flip": 0.5, "color_jitter": 0.3, "random_erasing": 0.5}


def load_epochs(dataset: PixelDataset, plan: EpochPlan, num_workers: int) -> list[Batch]:
    loader = Loader(dataset, num_workers, pin_memory=False)
    return [batch for epoch in range(2) for batch in loader(list(plan.batches(epoch)))]


def test_the_number_of_workers_cannot_change_a_batch(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, **AUGMENTED)
    dataset = pixel_dataset(data.train, config, ImageAugment(config))
    plan = EpochPlan(len(data.train), 4, config.seed)
    runs = [load_epochs(dataset, plan, num_workers) for num_workers in (0, 1, 2)]
    assert len(runs[0]) == 2 * plan.steps
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
            assert torch.equal(a.indices, b.indices)
            assert torch.equal(a.weights, b.weights)


@pytest.mark.skipif(sys.platform != "linux", reason="forking is not safe elsewhere")
def test_workers_share_the_index_of_the_training_process(tmp_path: Path) -> None:
    """Python 3.14's forkserver would give each a copy."""
    config, data = make_data(tmp_path)
    dataset = pixel_dataset(data.train, config, ImageAugment(config))
    context = Loader(dataset, 1, pin_memory=False).loader.multiprocessing_context
    assert context is not None
    assert context.get_start_method() == "fork"


def test_only_the_time_until_a_batch_comes_counts_as_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = make_data(tmp_path)
    loader = Loader(pixel_dataset(data.train, config), 0, pin_memory=False)
    now, load = [0.0], PixelDataset.__getitem__

    def slowly(dataset: PixelDataset, keys: Any) -> Batch:
        now[0] += 2.0
        return load(dataset, keys)

    monkeypatch.setattr(PixelDataset, "__getitem__", slowly)
    monkeypatch.setattr(loader_module.time, "perf_counter", lambda: now[0])
    for _ in loader([[(0, i, 1.0)] for i in range(3)]):
        now[0] += 100.0
    assert loader.waited == 6.0


def test_a_batch_holds_pixels_labels_weights_and_indices_of_its_images(tmp_path: Path) -> None:
    config, data = make_data(tmp_path)
    loader = Loader(pixel_dataset(data.train, config), 0, pin_memory=False)
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
        dataset = pixel_dataset(data.train, config.replace(seed=seed), ImageAugment(config))
        return dataset[[(epoch, index, 1.0) for index in indices]].images

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
    loader = Loader(pixel_dataset(data.train, config), num_workers, pin_memory=False)
    for _ in range(2):
        (batch,) = loader([[(0, 2, 1.0), (0, 3, 1.0)]])
        assert batch.weights.tolist() == [0, 1]
    assert list(loader.lost) == [str(gone)]
    assert sum(str(gone) in line for line in capsys.readouterr().out.splitlines()) == 1


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

    dataset = PixelDataset(data.train, 0, None, read, cache)
    if cached:
        monkeypatch.setattr(PixelCache, "__getitem__", lambda self, index: read(Path()))
    loader = Loader(dataset, 0, pin_memory=False, hang_seconds=0.05)
    named = str(cache.file) if cache else f"{data.train.root} ({data.train.paths[2]!r}"
    with pytest.raises(HangError, match=re.escape(named)):
        next(loader([[(0, 2, 1.0), (0, 3, 1.0)], [(0, 0, 1.0)]]))
    monkeypatch.setattr(reading, "PAUSES", ())
    stuck.set()


def test_a_slow_batch_is_waited_for_and_who_waits_can_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.01)
    _, data = make_data(tmp_path)
    waiting = Event()

    def read(path: Path) -> np.ndarray:  # type: ignore[type-arg]
        assert waiting.wait(60)
        return read_pixels(path)

    loader = Loader(PixelDataset(data.train, 0, None, read), 0, False, 60.0)
    loader.while_waiting = waiting.set
    (batch,) = loader([[(0, 2, 1.0)]])
    assert batch.weights.tolist() == [1]


def test_a_process_that_may_open_no_more_files_does_not_call_images_unreadable(tmp_path: Path) -> None:
    _, data = make_data(tmp_path)

    def read(path: Path) -> np.ndarray:  # type: ignore[type-arg]
        raise OSError(errno.EMFILE, "Too many open files")

    loader = Loader(PixelDataset(data.train, 0, None, read), 0, False)
    with pytest.raises(OSError, match="open files"):
        next(loader([[(0, 2, 1.0)]]))
    assert not loader.lost


def test_a_process_ends_with_its_loader_processes(tmp_path: Path) -> None:
    """They ignore the signals that stop a job, and must not outlive it."""
    make_data(tmp_path)
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from train_data import make_data, pixel_dataset\n"
        "from train.data.loader import Loader\n"
        "config, data = make_data(Path(sys.argv[1]))\n"
        "loader = Loader(pixel_dataset(data.train, config), 2, False)\n"
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
    loader = Loader(pixel_dataset(data.train, config), 1, pin_memory=False)
    batches = loader([[(0, i % 4, 1.0)] for i in range(12)])
    next(batches)
    (worker,) = set(psutil.Process().children()) - others
    for number in (signal.SIGTERM, signal.SIGINT):
        worker.send_signal(number)
    assert len(list(batches)) == 11

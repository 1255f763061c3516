"""Decoding once: the pixels of every epoch, built once whoever asks, never half a file."""

import errno
import hashlib
import pickle
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from forked import execute, fork
from PIL import Image, ImageFilter
from train_data import make_data

import train.data.pixel_cache as module
from serve.contract.errors import UserError
from serve.contract.images import load_image
from serve.contract.orientation import ORIENTATION
from train.config import TrainConfig
from train.data.augment import ImageAugment
from train.data.index import ImageSet, prepare_data
from train.data.loader import Loader, PixelDataset
from train.data.pixel_cache import PixelCache, open_cache, training_entries, validation_entries
from train.data.sampler import EpochPlan

Usage = namedtuple("Usage", "total used free")


def silent(_: str) -> None: ...


def open_training(folder: Path, images: ImageSet, config: TrainConfig) -> PixelCache:
    cache = open_cache(folder, images, training_entries(config), "on", silent)
    assert cache is not None
    return cache


def image_set(root: Path, *pictures: Image.Image, **options: object) -> ImageSet:
    root.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(root / f"{i}.png", **options)
    n = len(pictures)
    names = [f"{i}.png" for i in range(n)]
    sha256 = [hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names]
    return ImageSet(root, names, np.zeros(n, np.int64), ("a", "b"), sha256)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_batches_are_the_same_with_and_without_the_cache(tmp_path: Path) -> None:
    """Of images that the cache makes smaller, too."""
    config, data = make_data(tmp_path, image_size=8, crop_scale=0.5, epochs=2)
    cache = open_training(tmp_path / "cache", data.train, config)
    assert cache.sizes.min() == 12
    val = open_cache(tmp_path / "cache", data.val, validation_entries(config), "on", silent)
    plan = EpochPlan(len(data.train), 4, 0)
    for images, augment, stored, load in (
        (data.train, ImageAugment(config), cache, training_entries(config).load),
        (data.val, None, val, validation_entries(config).load),
    ):
        decoded = Loader(PixelDataset(images, 0, augment, load), 0, False)
        cached = Loader(PixelDataset(images, 0, augment, load, stored), 0, False)
        batches = (
            list(plan.batches(1)) if images is data.train else [[(0, i, 1.0) for i in range(len(images))]]
        )
        for a, b in zip(decoded(batches), cached(batches), strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)


def test_only_images_above_the_size_are_made_smaller(tmp_path: Path) -> None:
    pictures = [noise(40, 30), noise(90, 60), noise(30, 200), noise(8, 4)]
    images = image_set(tmp_path / "images", *pictures)
    cache = open_training(tmp_path / "cache", images, TrainConfig(cache_size=30))
    assert cache.sizes.tolist() == [[40, 30], [45, 30], [30, 200], [8, 4]]
    for i in (0, 2, 3):
        assert np.array_equal(cache[i], np.asarray(pictures[i]))
    smaller = np.asarray(pictures[1].resize((45, 30), Image.Resampling.LANCZOS))
    assert np.array_equal(cache[1], smaller)


def test_crops_from_the_cache_are_as_sharp_as_from_the_file(tmp_path: Path) -> None:
    """Else training would see blurred images, and validation sharp ones."""
    config = TrainConfig(image_size=32)
    soft = [noise(200, 200).filter(ImageFilter.GaussianBlur(radius)) for radius in (0.7, 1, 1.5, 2, 3, 4)]
    images = image_set(tmp_path / "images", *soft)
    cache = open_training(tmp_path / "cache", images, config)
    assert cache.sizes.max() < 60

    def sharpness(pixels: list[np.ndarray]) -> float:
        """Mean squared difference of neighbours."""
        crops = ImageAugment(config)(pixels, 0, 0, range(len(soft))).astype(float)
        return float((np.diff(crops, axis=1) ** 2).mean() + (np.diff(crops, axis=2) ** 2).mean())

    ratio = sharpness([cache[i] for i in range(len(soft))]) / sharpness([np.asarray(i) for i in soft])
    assert 0.95 < ratio < 1.05


@pytest.mark.parametrize(("crop_scale", "side"), [(0.25, 64), (0.5, 46), (0.01, 64), (1.0, 37)])
def test_the_smallest_random_crop_is_not_enlarged_up_to_twice_the_input(
    crop_scale: float, side: int
) -> None:
    config = TrainConfig(image_size=32, crop_scale=crop_scale)
    assert training_entries(config).settings["short_side"] == side


def test_an_image_on_its_side_is_stored_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    images = image_set(tmp_path / "images", noise(40, 30), exif=exif)
    cache = open_training(tmp_path / "cache", images, TrainConfig(image_size=32))
    assert cache[0].shape == (40, 30, 3)
    upright = load_image((images.root / "0.png").read_bytes())
    assert np.array_equal(cache[0], np.asarray(upright))


def test_other_splits_share_the_cache_and_other_contents_do_not(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, image_size=16)
    order = np.arange(len(data.train))[::-1]
    first = open_training(tmp_path / "cache", data.train, config)
    turned = open_training(tmp_path / "cache", data.train.take(order), config)
    assert first.file == turned.file
    assert np.array_equal(first[0], turned[len(order) - 1])
    assert open_training(tmp_path / "cache", data.train, config.replace(cache_size=9)).file != first.file
    shutil.copy(data.val.root / data.val.paths[0], data.train.root / data.train.paths[0])
    changed = prepare_data(config).train
    assert open_training(tmp_path / "cache", changed, config).file != first.file


@pytest.mark.parametrize("damage", ["no index", "truncated", "index of another"])
def test_half_a_cache_is_built_again(tmp_path: Path, damage: str) -> None:
    config, data = make_data(tmp_path, image_size=16)
    cache = open_training(tmp_path / "cache", data.train, config)
    whole = cache.file.read_bytes()
    if damage == "no index":
        (cache.file.parent / "sizes.npy").unlink()
    elif damage == "truncated":
        cache.file.write_bytes(whole[:-1])
    else:
        np.save(cache.file.parent / "sizes.npy", cache.sizes[:-1])
    again = open_training(tmp_path / "cache", data.train, config)
    assert again.file.read_bytes() == whole


def test_processes_that_ask_at_once_build_it_once(tmp_path: Path) -> None:
    make_data(tmp_path, image_size=16)
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from train.config import TrainConfig\n"
        "from train.data.index import prepare_data\n"
        "from train.data.pixel_cache import open_cache, training_entries\n"
        "config = TrainConfig(data=sys.argv[1], output=sys.argv[2], image_size=16)\n"
        "data = prepare_data(config)\n"
        "cache = open_cache(Path(sys.argv[2]), data.train, training_entries(config), 'on', print)\n"
        "print(sum(int(cache[i].sum()) for i in range(len(cache))))\n"
    )
    arguments = [str(tmp_path / "images"), str(tmp_path / "out")]
    logs = [tmp_path / f"log{number}" for number in range(4)]
    jobs = [fork(execute, program, arguments, cwd=REPOSITORY, log=log) for log in logs]
    for job in jobs:
        job.join(120)
    printed = [log.read_text() for log in logs]
    assert all(job.exitcode == 0 for job in jobs), printed
    assert "".join(printed).count("decoding once") == 1
    assert len({text.splitlines()[-1] for text in printed}) == 1


@pytest.mark.parametrize("other", ["nobody", "one that is faster"])
def test_without_file_locks_a_cache_is_whole_though_two_build_it(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither sees half of what the other one writes."""
    config, data = make_data(tmp_path, image_size=16)
    whole = open_training(tmp_path / "cache", data.train, config).file.read_bytes()
    folder, notes = tmp_path / "unlocked", []

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def flush(self: object) -> None:  # the last thing of a build
        monkeypatch.setattr(np.memmap, "flush", lambda self: None)
        monkeypatch.setattr("os.getpid", lambda: 1)
        assert not list(folder.glob("*/sizes.npy"))
        if other != "nobody":
            open_training(folder, data.train, config)

    monkeypatch.setattr("fcntl.lockf", refuse)
    monkeypatch.setattr(np.memmap, "flush", flush)
    cache = open_cache(folder, data.train, training_entries(config), "on", notes.append)
    assert cache is not None
    assert cache.file.read_bytes() == whole
    assert "No locks available" in notes[0]
    assert not list(folder.glob("*.tmp"))


def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, image_size=16)
    home = open_training(tmp_path / "cache", data.train, config).file.parent
    home.rename(home.with_name(f"{home.name}.machine-7.tmp"))
    open_training(tmp_path / "cache", data.train, config)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_without_room_it_is_an_error_or_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = image_set(tmp_path / "images", noise(40, 30))
    entries = training_entries(TrainConfig(image_size=32))
    monkeypatch.setattr(
        module, "shutil", SimpleNamespace(disk_usage=lambda _: Usage(0, 0, 3700), rmtree=shutil.rmtree)
    )
    notes: list[str] = []
    with pytest.raises(UserError, match=r"0\.0 MB.*--cache-size.*--pixel-cache off"):
        open_cache(tmp_path / "cache", images, entries, "on", notes.append)
    assert open_cache(tmp_path / "cache", images, entries, "auto", notes.append) is None
    assert "0.0 MB" in notes[0]
    assert not list((tmp_path / "cache").glob("*/*"))


def test_where_nothing_can_be_written_it_is_an_error_or_not_done(tmp_path: Path) -> None:
    images = image_set(tmp_path / "images", noise(40, 30))
    entries = training_entries(TrainConfig(image_size=32))
    (tmp_path / "cache").write_text("a file in its place")
    notes: list[str] = []
    with pytest.raises(ValueError, match=r"cache: File exists.*--output.*--pixel-cache off"):
        open_cache(tmp_path / "cache", images, entries, "on", notes.append)
    assert open_cache(tmp_path / "cache", images, entries, "auto", notes.append) is None
    assert "cache: File exists" in notes[-1]


def test_a_quota_is_found_out_when_room_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = image_set(tmp_path / "images", noise(40, 30))
    entries, notes = training_entries(TrainConfig(image_size=32)), []

    def refuse(*_: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(UserError, match="Disk quota exceeded"):
        open_cache(tmp_path / "cache", images, entries, "on", notes.append)
    assert open_cache(tmp_path / "cache", images, entries, "auto", notes.append) is None
    assert "Disk quota exceeded" in notes[-1]


def test_a_file_that_vanished_is_named_and_there_is_no_cache(tmp_path: Path) -> None:
    images = image_set(tmp_path / "images", noise(40, 30))
    (images.root / "0.png").unlink()
    notes: list[str] = []
    entries = training_entries(TrainConfig(image_size=32))
    assert open_cache(tmp_path / "cache", images, entries, "auto", notes.append) is None
    assert "0.png" in notes[-1]
    assert not list((tmp_path / "cache").glob("*/*"))


def test_a_file_that_changed_since_the_scan_is_an_error_and_nobodys_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.data.reading.PAUSES", ())
    images = image_set(tmp_path / "images", noise(40, 30))
    noise(30, 40).save(images.root / "0.png")
    entries = training_entries(TrainConfig(image_size=32))
    with pytest.raises(UserError, match=r"0\.png.*scan-"):
        open_cache(tmp_path / "cache", images, entries, "auto", silent)
    assert not list((tmp_path / "cache").glob("*/*"))


def test_what_another_decoder_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = make_data(tmp_path, image_size=16)
    first = open_training(tmp_path / "cache", data.train, config)
    monkeypatch.setattr(module, "DECODER", "another")
    assert open_training(tmp_path / "cache", data.train, config).file != first.file


def test_loader_processes_get_the_index_and_not_the_pixels(tmp_path: Path) -> None:
    images = image_set(tmp_path / "images", *[noise(200, 200)] * 3)
    cache = open_training(tmp_path / "cache", images, TrainConfig(image_size=128))
    assert cache[2].sum() > 0  # mapped
    sent = pickle.dumps(cache)
    assert len(sent) < 2000
    assert np.array_equal(pickle.loads(sent)[2], cache[2])
    with pytest.raises(ValueError, match="read-only"):
        cache[0][0, 0, 0] = 1


def test_loader_processes_that_are_spawned_get_what_decodes(tmp_path: Path) -> None:
    """As they are where forking is not safe."""
    config, data = make_data(tmp_path)
    for augment, entries in ((ImageAugment(config), training_entries), (None, validation_entries)):
        dataset, keys = PixelDataset(data.val, 0, augment, entries(config).load), [(0, 0, 1.0)]
        sent = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(sent[keys].images, dataset[keys].images)

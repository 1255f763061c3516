"""Each image is read once before training; what is unreadable is named with its reason."""

import hashlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from train_data import draw, flat_set

from serve.contract.doubts import NARROW
from train.data import scan as module
from train.data.scan import ScanResult, scan


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was really opened."""
    counter: Counter[str] = Counter()
    read = module.read_image_file

    def counted(path: Path) -> bytes:
        counter[path.name] += 1
        return read(path)

    monkeypatch.setattr(module, "read_image_file", counted)
    return counter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return flat_set(tmp_path / "images", per_class=2)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def cache_file(folder: Path) -> Path:
    (file,) = folder.glob("scan-*.json")
    return file


def content(result: ScanResult) -> tuple[object, ...]:
    return result.sha256, result.bad, result.thumbnails.tolist()


def test_readable_files_are_hashed(root: Path, tmp_path: Path) -> None:
    result = scan(root, names(root), tmp_path / "cache")
    assert result.bad == {}
    assert result.sha256 == {n: hashlib.sha256((root / n).read_bytes()).hexdigest() for n in names(root)}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_thumbnail_of_a_large_image_is_that_of_the_whole(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(40))
    pixels = np.clip((np.asarray(image).astype(float) - 127) * 40 + 127, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.img", kind)
    thumbnail = scan(tmp_path, ["a.img"], tmp_path / "cache").thumbnails[0].astype(int)
    exact = Image.open(tmp_path / "a.img").resize((8, 8), Image.Resampling.BILINEAR).convert("L")
    assert np.ptp(thumbnail) > 60
    assert np.abs(thumbnail - np.asarray(exact).astype(int)).max() <= 5


def test_thumbnails_are_upright_grey_and_in_the_order_of_the_files(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    halves = np.zeros((64, 48, 3), np.uint8)
    halves[:32] = (255, 0, 0)
    Image.fromarray(halves).save(tmp_path / "b.png")
    Image.fromarray(halves[::-1, ::-1]).save(tmp_path / "c.jpg", exif=exif, quality=95)
    Image.fromarray(255 - halves).convert("LA").save(tmp_path / "a.png")
    text(tmp_path / "d.png")
    result = scan(tmp_path, ["b.png", "d.png", "c.jpg", "a.png"], tmp_path / "cache")
    assert list(result.sha256) == ["b.png", "c.jpg", "a.png"]
    assert result.thumbnails.shape == (3, 8, 8)
    assert result.thumbnails[0, 0].tolist() == [76] * 8
    assert result.thumbnails[0, 7].tolist() == [0] * 8
    np.testing.assert_allclose(result.thumbnails[1].astype(int), result.thumbnails[0], atol=2)
    np.testing.assert_allclose(result.thumbnails[2].astype(int), 255 - result.thumbnails[0], atol=2)


def truncated(path: Path) -> None:
    data = draw(path, size=(200, 200)).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def empty(path: Path) -> None:
    path.touch()


def text(path: Path) -> None:
    path.write_text("hello")


def folder(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to("nowhere.png")


def fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (truncated, "truncated"),
        (empty, "empty file"),
        (text, "not an image file"),
        (folder, "Is a directory"),
        (dangling, "No such file"),
        (fifo, "not a regular file"),
    ],
)
def test_an_unreadable_file_is_named_with_the_reason(
    root: Path, tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    make(root / "cat.9.png")
    done = threading.Event()
    results = []

    def work() -> None:
        results.append(scan(root, names(root), tmp_path / "cache"))
        done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(20), "blocked"
    assert list(results[0].bad) == ["cat.9.png"]
    assert reason in results[0].bad["cat.9.png"]
    assert len(results[0].sha256) == 4


def test_a_second_scan_reads_nothing(root: Path, tmp_path: Path, reads: Counter[str]) -> None:
    text(root / "cat.9.png")
    first = scan(root, names(root), tmp_path / "cache")
    assert set(reads.values()) == {1}
    assert content(scan(root, names(root), tmp_path / "cache")) == content(first)
    assert set(reads.values()) == {1}


@pytest.mark.parametrize("damage", ["", "[", "[1]", '{"cat.0.png": 5}', '{"cat.0.png": "12345"}'])
def test_a_damaged_cache_is_read_anew(root: Path, tmp_path: Path, damage: str) -> None:
    first = content(scan(root, names(root), tmp_path / "cache"))
    cache_file(tmp_path / "cache").write_text(damage)
    assert content(scan(root, names(root), tmp_path / "cache")) == first


def test_a_file_of_another_size_or_time_is_read_again(
    root: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    scan(root, names(root), tmp_path / "cache")
    draw(root / "cat.0.png", 1, 50, size=(9, 9))
    os.utime(root / "cat.1.png", ns=(1, 1))
    result = scan(root, names(root), tmp_path / "cache")
    assert reads == {"cat.0.png": 2, "cat.1.png": 2, "dog.0.png": 1, "dog.1.png": 1}
    assert result.sha256["cat.0.png"] == hashlib.sha256((root / "cat.0.png").read_bytes()).hexdigest()


def in_place(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def renamed(path: Path, data: bytes) -> None:
    new = path.with_name("new")
    new.write_bytes(data)
    shutil.copystat(path, new)
    new.replace(path)


@pytest.mark.parametrize("replace", [in_place, renamed], ids=["cp -p", "rsync -t"])
def test_a_file_of_the_same_size_and_time_is_read_again(
    root: Path, tmp_path: Path, reads: Counter[str], replace: Callable[[Path, bytes], None]
) -> None:
    path = root / "cat.0.png"
    before, info = scan(root, names(root), tmp_path / "cache"), path.stat()
    data = path.read_bytes()
    replace(path, data[:-20] + bytes(byte ^ 1 for byte in data[-20:-12]) + data[-12:])
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (info.st_size, info.st_mtime_ns)
    after = scan(root, names(root), tmp_path / "cache")
    assert reads == {"cat.0.png": 2, "cat.1.png": 1, "dog.0.png": 1, "dog.1.png": 1}
    assert (after.sha256.get(path.name), after.bad) != (before.sha256[path.name], {})


def test_what_another_decoder_made_is_made_again(
    root: Path, tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(root, names(root), tmp_path / "cache")
    monkeypatch.setattr(module, "DECODER", "another")
    scan(root, names(root), tmp_path / "cache")
    assert set(reads.values()) == {2}


def test_a_file_that_was_mended_is_good_again(root: Path, tmp_path: Path) -> None:
    text(root / "cat.9.png")
    assert scan(root, names(root), tmp_path / "cache").bad
    draw(root / "cat.9.png", 0, 9)
    assert not scan(root, names(root), tmp_path / "cache").bad


def test_an_error_of_the_file_system_is_not_remembered(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """chmod changes neither size nor time; nor does a server that comes back."""

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_image_file", denied)
        result = scan(root, names(root), tmp_path / "cache")
        assert result.bad == dict.fromkeys(names(root), "Permission denied")
    assert not scan(root, names(root), tmp_path / "cache").bad


@pytest.mark.parametrize("damage", ["", "{", "[1, 2]", "null", "\0\0", '{"cat.0.png": null}', "tr\udcff"])
def test_a_damaged_cache_is_ignored(root: Path, tmp_path: Path, damage: str) -> None:
    first = scan(root, names(root), tmp_path / "cache")
    cache_file(tmp_path / "cache").write_bytes(damage.encode("utf-8", "surrogateescape"))
    assert content(scan(root, names(root), tmp_path / "cache")) == content(first)


def test_a_cache_of_an_older_version_is_read_again_where_it_says_too_little(
    root: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    text(root / "cat.9.png")
    first = scan(root, names(root), tmp_path / "cache")
    file = cache_file(tmp_path / "cache")
    file.write_text(json.dumps({name: entry[:3] for name, entry in json.loads(file.read_text()).items()}))
    assert content(scan(root, names(root), tmp_path / "cache")) == content(first)
    assert set(reads.values()) == {2}


def test_a_cache_that_cannot_be_written_is_a_warning(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(scan(root, names(root), tmp_path / "cache").sha256) == 4
    printed = capsys.readouterr().out
    assert printed.startswith("warning:")
    assert str(tmp_path) in printed


def test_two_data_sets_have_two_caches(root: Path, tmp_path: Path) -> None:
    other = flat_set(tmp_path / "other", per_class=2)
    draw(other / "cat.0.png", 1, 88)
    for folder in (root, other):
        scan(folder, names(folder), tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("scan-*.json"))) == 2


def test_odd_file_names_are_scanned_and_cached(root: Path, tmp_path: Path, reads: Counter[str]) -> None:
    for name in ("a\nb.1.png", "고양이.1.png", os.fsdecode(b"\xff\xfe.1.png"), "c'\",.1.png"):
        shutil.copy(root / "cat.0.png", root / name)
    for _ in range(2):
        assert len(scan(root, names(root), tmp_path / "cache").sha256) == 8
    assert set(reads.values()) == {1}


def test_a_picture_that_looks_wrong_is_good_and_named_again_from_the_cache(
    root: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    narrow = np.arange(48 * 40, dtype=np.uint16).reshape(40, 48)
    Image.fromarray(narrow).save(root / "dog.9.png")
    for _ in range(2):
        result = scan(root, names(root), tmp_path / "cache")
        (line,) = result.doubts.lines()
        assert "'dog.9.png'" in line
        assert NARROW in line
        assert "dog.9.png" in result.sha256
        assert result.bad == {}
    assert set(reads.values()) == {1}


def test_another_limit_of_pixels_reads_again_what_an_earlier_scan_has_kept(
    tmp_path: Path, reads: Counter[str]
) -> None:
    path = draw(tmp_path / "images" / "large.png", size=(1100, 1000))
    for limit, readable in ((1.0, False), (2.0, True), (1.0, False), (64.0, True), (64.0, True)):
        result = scan(path.parent, [path.name], tmp_path, limit)
        assert bool(result.sha256) == readable
        assert readable or "--max-megapixels" in result.bad[path.name]
    assert reads[path.name] == 4

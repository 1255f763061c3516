"""Any number of names, sorted, once each, in next to no memory."""

import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_model import open_descriptors_unchanged

from serve.inputs.inventory import Entry, Inventory, digest_names, printable

names = st.text(st.characters(exclude_characters="\0", exclude_categories=()), min_size=1, max_size=20)


def rows(inventory: Inventory, start: int = 0, stop: int | None = None) -> list[tuple[str, str]]:
    return [(entry.name, entry.location) for entry in inventory.entries(start, stop)]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, st.text(st.characters(exclude_characters="\0"), max_size=5)), st.randoms())
def test_names_come_back_sorted_by_code_point(entries: dict[str, str], random: object) -> None:
    shuffled = list(entries.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert rows(Inventory.sort(Entry(*pair) for pair in shuffled)) == sorted(entries.items())


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000])
def test_any_range_can_be_read(count: int) -> None:
    expected = sorted((f"{i * 7919 % 1009}\n.jpg", str(i)) for i in range(count))
    sorted_names = Inventory.sort(Entry(*pair) for pair in reversed(expected))
    assert len(sorted_names) == count
    for start, stop in ((0, None), (0, 0), (3, 5), (254, 258), (255, 256), (256, 512), (999, 5000), (5, 3)):
        assert rows(sorted_names, start, stop) == expected[start:stop]


def test_a_repeated_name_is_one_input_the_one_whose_location_is_last() -> None:
    entries = [Entry("b", "1"), Entry("a"), Entry("b", "3"), Entry("b", "2"), Entry("a")]
    sorted_names = Inventory.sort(entries)
    assert rows(sorted_names) == [("a", ""), ("b", "3")]
    assert sorted_names.repeated == 3


def test_two_readers_do_not_disturb_each_other() -> None:
    sorted_names = Inventory.sort(Entry(f"{i:05}") for i in range(600))
    one, other = sorted_names.entries(), sorted_names.entries(300)
    assert [(next(one).name, next(other).name) for _ in range(300)] == [
        (f"{i:05}", f"{i + 300:05}") for i in range(300)
    ]


def test_the_digest_is_of_the_names_as_they_are_written() -> None:
    strange = ["b\n.jpg", os.fsdecode(b"caf\xe9.jpg"), "고양이.jpg"]
    digest = Inventory.sort(map(Entry, strange)).digest()
    assert digest == digest_names(printable(name) for name in sorted(strange))
    assert digest != Inventory.sort(Entry(name) for name in strange[1:]).digest()
    assert (
        Inventory.sort([Entry("ab"), Entry("c")]).digest()
        != Inventory.sort([Entry("a"), Entry("bc")]).digest()
    )


def test_a_name_with_a_nul_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a\\x00b'"):
        Inventory.sort([Entry("a\0b")])


def test_nothing_is_left_on_disk_and_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    with open_descriptors_unchanged():
        sorted_names = Inventory.sort(Entry(f"{i:09}" * 20) for i in range(50_000))
        assert list(tmp_path.iterdir()) == []
        del sorted_names


def test_a_full_disk_is_an_error_that_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def small(*arguments: Any, **options: Any) -> sqlite3.Connection:
        database = connect(*arguments, **options)
        database.execute("PRAGMA max_page_count = 10")
        return database

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(OSError, match="full") as error:
        Inventory.sort(Entry(f"{i:09}") for i in range(50_000))
    assert error.value.errno == errno.ENOSPC


def test_half_a_million_names_cost_a_few_megabytes() -> None:
    def endless() -> Iterator[Entry]:
        for i in range(500_000):
            yield Entry(f"folder/image-{i * 7919 % 500_009:09}.jpg")

    before = peak_kilobytes()
    sorted_names = Inventory.sort(endless())
    growth = peak_kilobytes() - before
    assert sum(1 for _ in sorted_names.entries()) == 500_000
    assert growth < 20_000, f"{growth} kB"


def peak_kilobytes() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

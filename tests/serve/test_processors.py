"""Processors: affinity and control groups, laid out as the kernel shows them in each kind of container."""

import os
from pathlib import Path

import pytest

import serve.processors
from serve.processors import available_processors, cpu_quota, memory_limit, processor_flags


def lay_out(root: Path, groups: list[str], files: dict[str, str]) -> Path:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text("".join(line + "\n" for line in groups))
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def version_2(root: Path, limits: dict[str, str], group: str = "/") -> Path:
    return lay_out(root, [f"0::{group}"], {f"{folder}/cpu.max": text for folder, text in limits.items()})


def version_1(root: Path, limits: dict[str, tuple[int, int]], group: str = "/") -> Path:
    files = {}
    for folder, (quota, period) in limits.items():
        files[f"cpu/{folder}/cpu.cfs_quota_us"] = str(quota)
        files[f"cpu/{folder}/cpu.cfs_period_us"] = str(period)
    # the memory controller's group is another one, and comes first
    return lay_out(root, ["5:memory:/elsewhere", f"4:cpu,cpuacct:{group}", "3:cpuset:/cpu"], files)


@pytest.mark.parametrize(
    ("text", "quota"),
    [("150000 100000", 1.5), ("50000 100000", 0.5), ("max 100000", None), ("max", None), ("30000", 0.3)],
)
def test_version_2_in_a_container(tmp_path: Path, text: str, quota: float | None) -> None:
    assert cpu_quota(version_2(tmp_path, {"": text})) == quota


@pytest.mark.parametrize(
    ("limit", "quota"), [((200_000, 100_000), 2.0), ((-1, 100_000), None), ((12_500, 50_000), 0.25)]
)
def test_version_1_in_a_container(tmp_path: Path, limit: tuple[int, int], quota: float | None) -> None:
    assert cpu_quota(version_1(tmp_path, {"": limit})) == quota


def test_of_nested_groups_the_smallest_holds(tmp_path: Path) -> None:
    """A pod of 3 processors in a slice of 2.5, and a sibling's limit is nobody's business."""
    limits = {
        "": "max 100000",
        "pods": "250000 100000",
        "pods/mine": "300000 100000",
        "pods/mine/inner": "max 100000",
        "pods/other": "10000 100000",
    }
    assert cpu_quota(version_2(tmp_path / "2", limits, group="/pods/mine/inner")) == 2.5
    numbers = {"": (-1, 100_000), "a": (400_000, 100_000), "a/b": (100_000, 25_000), "c": (1000, 100_000)}
    assert cpu_quota(version_1(tmp_path / "1", numbers, group="/a/b")) == 4.0


def test_of_memory_the_strictest_limit_holds(tmp_path: Path) -> None:
    groups = {"memory.max": "max", "pods/memory.max": "2147483648", "other/memory.max": "1"}
    assert memory_limit(lay_out(tmp_path / "2", ["0::/pods/mine"], groups)) == 2**31
    groups = {"memory/memory.limit_in_bytes": "1073741824", "memory.limit_in_bytes": "1"}
    assert memory_limit(lay_out(tmp_path / "1", ["5:memory:/", "4:cpu:/"], groups)) == 2**30
    assert memory_limit(lay_out(tmp_path / "0", ["0::/"], {"memory.max": "max"})) is None


def test_a_container_sees_its_own_group_as_the_top_and_the_path_of_outside(tmp_path: Path) -> None:
    assert cpu_quota(version_1(tmp_path / "1", {"": (150_000, 100_000)}, "/docker/abc")) == 1.5
    assert cpu_quota(version_2(tmp_path / "2", {"": "70000 100000"}, "/../outside")) == 0.7


def test_both_versions_at_once(tmp_path: Path) -> None:
    files = {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}
    assert cpu_quota(lay_out(tmp_path, ["1:cpu,cpuacct:/", "0::/"], files)) == 3.0


@pytest.mark.parametrize("text", ["", "nonsense", "100000 0", "0 100000", "-5 100000"])
def test_what_cannot_be_understood_is_no_limit(tmp_path: Path, text: str) -> None:
    assert cpu_quota(version_2(tmp_path, {"": text})) is None


def test_without_proc_there_is_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert available_processors(tmp_path) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("quota", "affinity", "count"),
    [
        ("50000", 8, 1),
        ("100000", 8, 1),
        ("150000", 8, 2),
        ("210000", 8, 3),
        ("900000", 8, 8),
        ("max", 3, 3),
    ],
)
def test_the_lesser_of_affinity_and_quota_rounded_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, affinity: int, count: int
) -> None:
    monkeypatch.setattr(serve.processors.os, "sched_getaffinity", lambda _: set(range(affinity)))
    assert available_processors(version_2(tmp_path, {"": f"{quota} 100000"})) == count


def test_flags_of_the_first_processor(tmp_path: Path) -> None:
    assert processor_flags(tmp_path) == frozenset()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "processor\t: 0\nflags\t\t: fpu avx512_bf16\nbugs\t: x\n\nflags\t: no\n"
    )
    assert processor_flags(tmp_path) == {"fpu", "avx512_bf16"}


def test_this_very_machine_is_understood() -> None:
    assert 1 <= available_processors() <= len(os.sched_getaffinity(0))

"""What this process may use of the machine (affinity and control groups' limits), and what it can do."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

DEFAULT_PERIOD = 100_000  # microseconds


def available_processors(root: Path = Path("/")) -> int:
    """At least 1. `root` holds proc/ and what is mounted; tests lay it out themselves.

    A quota of 1.5 processors counts as 2: a thread too many waits for the next period, a thread too few
    leaves time unused.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    count = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota = cpu_quota(root)
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def processor_flags(root: Path = Path("/")) -> frozenset[str]:
    """Instruction sets by Linux's names, such as avx512_bf16 or amx_bf16; empty where that is not known."""
    for line in _lines(root / "proc/cpuinfo"):
        name, _, flags = line.partition(":")
        if name.strip() == "flags":
            return frozenset(flags.split())
    return frozenset()


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the processors' worth of time in each period, of the strictest control group; None: no limit.

    Container runtimes (docker --cpus, a pod's limits.cpu) set it and leave the affinity alone. Source:
    the kernel's cgroup-v2.rst (cpu.max) and sched-bwc.rst (cpu.cfs_quota_us).
    """
    quotas = [quota for group in _groups(root) if (quota := _quota(group)) is not None]
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the bytes of the strictest control group, above which a process is killed; None: no limit."""
    files = ("memory.max", "memory.limit_in_bytes")  # versions 2 and 1
    lines = [_lines(group / name)[:1] for group in _groups(root, "memory") for name in files]
    return min((int(line) for found in lines for line in found if line.isdecimal()), default=None)


def _groups(root: Path, controller: str = "cpu") -> Iterator[Path]:
    """Yield folders of this process's control groups up to the top, which in a container is its own group.

    Some may not exist: on version 1, a container sees its group's path as it is outside.
    """
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, group = line.split(":", 2)
        version_2 = number == "0" and not controllers
        if version_2 or controller in controllers.split(","):
            top = root / ("sys/fs/cgroup" if version_2 else f"sys/fs/cgroup/{controller}")
            path = PurePosixPath(group.lstrip("/"))
            yield from (top / folder for folder in (path, *path.parents))


def _quota(group: Path) -> float | None:
    if limit := _lines(group / "cpu.max"):  # version 2: "QUOTA PERIOD", QUOTA may be "max"
        quota, _, period = limit[0].partition(" ")
    else:  # version 1: -1 is no limit
        files = (_lines(group / "cpu.cfs_quota_us"), _lines(group / "cpu.cfs_period_us"))
        quota, period = (lines[0] if lines else "" for lines in files)
    try:
        processors = int(quota) / int(period or DEFAULT_PERIOD)
    except (ValueError, ZeroDivisionError):
        return None
    return processors if processors > 0 else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux, or not mounted
        return []

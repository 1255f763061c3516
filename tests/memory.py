"""For tests of what memory an operation costs at its peak."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MEGABYTE = 2**20


@contextmanager
def resident_memory_grows_below(limit: int) -> Iterator[None]:
    """Bytes, at the peak; Pillow's pixels are not Python objects, so the kernel is asked."""

    def status(field: str) -> int:
        line = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert line is not None
        return int(line[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    yield
    growth = status("VmHWM") - before
    assert growth < limit, f"{growth / MEGABYTE:.0f} MB"

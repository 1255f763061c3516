"""Make a session in memory that is used again, and give back what it no longer needs.

onnxruntime copies the weights three times while it optimises a graph. By default glibc takes a large block
from the system anew, which the kernel clears and maps page by page, and keeps what was in smaller ones.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_BLOCK = 2**25  # of the heap: glibc's own limit, DEFAULT_MMAP_THRESHOLD_MAX


@contextmanager
def reused_heap() -> Iterator[None]:
    """From here on, blocks of up to 32 MiB come from glibc's heap, as by its own rules once one was freed;
    at the end, what is free of it goes back to the system. No effect without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_BLOCK)
    try:
        yield
    finally:
        libc.malloc_trim(ctypes.c_size_t(0))

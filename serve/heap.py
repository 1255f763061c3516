"""Make a session in memory that is there already and used again, and give back what it no longer needs.

onnxruntime copies the weights three times while it optimises a graph. By default glibc takes a large block
from the system anew, which the kernel clears and maps page by page, and keeps what was in smaller ones.
"""

import ctypes
import mmap
import os
import platform
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_BLOCK = 2**25  # of the heap: glibc's own limit, DEFAULT_MMAP_THRESHOLD_MAX
UNLIMITED = 2**31 - 1  # mallopt takes an int
MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h; an error before Linux 5.14
COPIES = 2  # of the weights, at least, that are in memory at once
MOST_MAPPED = 2**27  # of larger models too much would be in memory in the end

_warming: list[tuple[int, threading.Thread]] = []
"""Blocks of the heap and the threads that have them mapped."""


def warm_up(arguments: Sequence[str]) -> None:
    """Have memory mapped in a thread, for the model that follows `--model`, while the caller imports
    onnxruntime; `reused_heap` uses it. Nothing is done without such a file of up to 64 MiB, and glibc."""
    libc, size = _glibc(), COPIES * _model_size(arguments)
    if libc is None or not 0 < size <= MOST_MAPPED:
        return
    libc.mallopt(M_MMAP_THRESHOLD, UNLIMITED)
    libc.mallopt(M_TRIM_THRESHOLD, UNLIMITED)
    if block := libc.malloc(size):
        first = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
        mapping = (first, max(0, block + size - first), MADV_POPULATE_WRITE)
        thread = threading.Thread(target=libc.madvise, args=mapping, daemon=True)
        _warming.append((block, thread))
        thread.start()


@contextmanager
def reused_heap() -> Iterator[None]:
    """From here on, blocks of up to 32 MiB come from glibc's heap, as by its own rules once one was freed;
    at the end, what is free of it goes back to the system. No effect without glibc."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, UNLIMITED if _warming else LARGEST_BLOCK)
    libc.mallopt(M_TRIM_THRESHOLD, UNLIMITED)
    while _warming:
        block, thread = _warming.pop()
        thread.join()
        libc.free(block)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_BLOCK)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc


def _model_size(arguments: Sequence[str]) -> int:
    """Bytes of the local file that is named, else 0."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, _, value = argument.partition("=")
        if flag == "--model":
            path = value or following
            return os.path.getsize(path) if os.path.isfile(path) else 0
    return 0

"""Wall time and peak memory of a command and all of its processes together.

    python benchmarks/measure.py make run

Memory is the sum of the processes' proportional set sizes (shared pages count once), read twice a second.
"""

import subprocess
import sys
import time

import psutil

SECONDS_BETWEEN_READINGS = 0.5


def tree_bytes(root: psutil.Process) -> int:
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it ended meanwhile
            continue
    return total


def peak_bytes(child: subprocess.Popen[str], seconds: float = SECONDS_BETWEEN_READINGS) -> int:
    """Waits for its end, reading so often."""
    root, peak = psutil.Process(child.pid), 0
    while child.poll() is None:
        try:
            peak = max(peak, tree_bytes(root))
        except psutil.NoSuchProcess:
            break
        time.sleep(seconds)
    return peak


def main() -> int:
    started = time.perf_counter()
    child = subprocess.Popen(sys.argv[1:], text=True)
    peak = peak_bytes(child)
    seconds = time.perf_counter() - started
    print(f"{' '.join(sys.argv[1:])}: {seconds:.0f} s, peak memory {peak / 2**20:.0f} MiB")
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())

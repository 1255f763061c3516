"""Measure what each test file costs: seconds, and processor seconds with those of its child processes.

    python benchmarks/test_times.py [--output times.csv] [PYTEST ARGUMENTS]

runs pytest with this file as a plugin and prints a table, dearest first. A fixture shared by several
files counts for the file that asked for it first. Child processes count once they have ended and been
waited for.
"""

import argparse
import csv
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
RECORDS = "TEST_TIMES_RECORDS"  # where the plugin appends one line a test


def processor_seconds() -> float:
    """Return user and system seconds of this process, its ended children, and its server of forks."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    server = getattr(forkserver._forkserver, "_forkserver_pid", None)
    return seconds + (sum(psutil.Process(server).cpu_times()[:4]) if server else 0.0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, None, None]:
    seconds, processor = time.perf_counter(), processor_seconds()
    yield
    if RECORDS in os.environ:
        record = {
            "test": item.nodeid,
            "seconds": time.perf_counter() - seconds,
            "processor_seconds": processor_seconds() - processor,
        }
        with open(os.environ[RECORDS], "a") as file:
            file.write(json.dumps(record) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="also write a row for each test to this CSV")
    arguments, pytest_arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        records.touch()
        path = os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, RECORDS: str(records), "PYTHONPATH": path}
        started, processor = time.perf_counter(), processor_seconds()
        command = [sys.executable, "-m", "pytest", "-p", "test_times", *pytest_arguments]
        # what outlives the process that started it becomes a child of this one, and is waited for
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        tests, code = subprocess.Popen(command, env=environment, cwd=ROOT).pid, 1
        with suppress(ChildProcessError):
            while True:
                ended, status = os.wait()
                code = os.waitstatus_to_exitcode(status) if ended == tests else code
        wall, total = time.perf_counter() - started, processor_seconds() - processor
        rows = [json.loads(line) for line in records.read_text().splitlines()]
    if arguments.output:
        with open(arguments.output, "w", newline="") as file:
            writer = csv.DictWriter(file, ["test", "seconds", "processor_seconds"])
            writer.writeheader()
            writer.writerows(rows)
    files: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for row in rows:
        entry = files[row["test"].split("::")[0]]
        entry[0] += 1
        entry[1] += row["seconds"]
        entry[2] += row["processor_seconds"]
    print(f"\n{'file':44} {'tests':>6} {'seconds':>9} {'processor s':>12}")
    for name, (count, seconds, processor) in sorted(files.items(), key=lambda item: -item[1][2]):
        print(f"{name:44} {count:6} {seconds:9.1f} {processor:12.1f}")
    print(f"{'all, start and collection included':44} {len(rows):6} {wall:9.1f} {total:12.1f}")
    return code


if __name__ == "__main__":
    sys.exit(main())

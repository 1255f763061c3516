"""Score a million file names: is memory flat?

    python benchmarks/million.py --rows 1000000

The names are hard links to 64 small drawings; the network is that of the tests (the mean colour), at 32
pixels, so that names and rows are what costs. Prints the resident memory of the scoring process while it
lists, at 1, 10 and 100 % of the rows, and its peak.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from serve_model import build_model, colour_of, encode, solid  # noqa: E402

NUM_FILES = 64  # ext4 allows 65,000 links to one
FILES_IN_A_FOLDER = 100_000


def make_names(root: Path, count: int) -> None:
    originals = root.parent / "originals"
    originals.mkdir()
    for number in range(NUM_FILES):
        data = encode(solid(colour_of(number), (40, 40)), "JPEG")
        (originals / f"{number}.jpg").write_bytes(data)
    for number in range(count):
        folder = root / f"folder-{number // FILES_IN_A_FOLDER:02}"
        if number % FILES_IN_A_FOLDER == 0:
            folder.mkdir(parents=True)
        os.link(originals / f"{number % NUM_FILES}.jpg", folder / f"photograph-{number:08}.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--format", default="csv")
    parser.add_argument("--scratch", type=Path, help="folder for the names and the output")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
        folder = Path(temporary)
        make_names(folder / "images", args.rows)
        model = build_model(folder / "model.onnx", size=32)
        command = [sys.executable, str(ROOT / "serve" / "main.py"), "--model", str(model)]
        command += ["--images", str(folder / "images"), "--output", str(folder / f"out.{args.format}")]
        command += ["--workers", str(args.workers)]
        started = time.perf_counter()
        child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        process = psutil.Process(child.pid)
        readings: list[tuple[str, float]] = []
        peak = 0.0

        def watch() -> None:
            nonlocal peak
            while child.poll() is None:
                try:
                    peak = max(peak, process.memory_info().rss / 2**20)
                except psutil.Error:
                    return
                time.sleep(0.05)

        threading.Thread(target=watch, daemon=True).start()
        wanted = [args.rows // 100, args.rows // 10, args.rows]
        assert child.stderr is not None
        for line in child.stderr:
            rss = process.memory_info().rss / 2**20
            if line.startswith("scoring "):
                readings.append(("listed and sorted", rss))
                print(f"listed after {time.perf_counter() - started:.0f} s", flush=True)
            done = line.partition("/")[0]
            while done.isdecimal() and wanted and int(done) >= wanted[0]:
                readings.append((f"{int(done):,} rows", rss))
                wanted.pop(0)
            if done.isdecimal():
                last = (f"{int(done):,} rows", rss)
        readings += [last, ("peak", peak)]
        printed = child.communicate()[0]
        assert child.returncode == 0
        print("| when | resident MiB |\n|---|---|")
        for when, rss in readings:
            print(f"| {when} | {rss:.0f} |")
        print(printed.replace(temporary, ""), f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()

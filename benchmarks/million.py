"""Score a million file names: is memory flat? Do the parts of killed shards make a whole?

    python benchmarks/million.py --rows 1000000
    python benchmarks/million.py --rows 1000000 --shards 8 --kill 3

The names are hard links to 64 small drawings; the network is that of the tests (the mean colour), at 32
pixels, so that names and rows are what costs. Prints the resident memory of the scoring process while it
lists, at 1, 10 and 100 % of the rows, and its peak.

With --shards, as many processes play an Indexed Job's pods, a few at a time; --kill of them are ended with
SIGKILL at a random moment and started again. The merged file must have a row for each name, once.
"""

import argparse
import csv
import os
import random
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


def score_shards(args: argparse.Namespace, folder: Path, model: Path) -> None:
    draw, started = random.Random(args.seed), time.perf_counter()
    output = folder / f"parts-{args.format}"
    to_kill = set(draw.sample(range(args.shards), args.kill))
    command = [sys.executable, str(ROOT / "serve" / "main.py"), "--model", str(model), "--resume"]
    command += ["--images", str(folder / "images"), "--output", str(output), "--format", args.format]
    command += ["--shard", f"auto/{args.shards}", "--workers", "1", "--part-size", "20000"]

    def pod(index: int) -> subprocess.Popen[bytes]:
        environment = os.environ | {"JOB_COMPLETION_INDEX": str(index)}
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)

    waiting, running, seconds = list(range(args.shards)), {}, {}
    while waiting or running:
        while waiting and len(running) < args.at_a_time:
            index = waiting.pop(0)
            running[index] = pod(index)
            seconds[index] = time.perf_counter()
        time.sleep(0.1)
        for index, process in list(running.items()):
            if index in to_kill and pieces_done(output, index) and draw.random() < 0.05:
                process.kill()
                process.wait()
                to_kill.remove(index)
                kept = pieces_done(output, index)
                print(f"shard {index} killed with {kept} finished pieces, started again", flush=True)
                running[index] = pod(index)
            elif process.poll() is not None:
                assert process.returncode == 0, f"shard {index}: exit code {process.returncode}"
                print(f"shard {index} done after {time.perf_counter() - seconds[index]:.0f} s", flush=True)
                del running[index]
    assert not to_kill, f"{to_kill} ended before they could be killed"
    merged = folder / f"merged.{args.format}"
    merge = [sys.executable, str(ROOT / "serve" / "merge.py"), str(output), "--output", str(merged)]
    done = subprocess.run(merge, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout.replace(str(folder), ""), end="")
    with merged.open(newline="", encoding="utf-8") as file:
        previous, rows, wrong = "", 0, 0
        for row in csv.DictReader(file):
            assert row["path"] > previous, "rows are sorted, each name once"
            previous, rows = row["path"], rows + 1
            wrong += bool(row["error"]) or not row["label"]
    assert rows == args.rows, f"{rows} rows for {args.rows} names"
    print(f"{rows} rows, each name once, {wrong} without an answer; {time.perf_counter() - started:.0f} s")


def pieces_done(output: Path, index: int) -> int:
    return len(list(output.glob(f".part-{index:05}-*.pieces/*.json")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--format", default="csv")
    parser.add_argument("--shards", type=int, default=0)
    parser.add_argument("--kill", type=int, default=3)
    parser.add_argument("--at-a-time", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder for the names and the output")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
        folder = Path(temporary)
        make_names(folder / "images", args.rows)
        model = build_model(folder / "model.onnx", size=32)
        if args.shards:
            score_shards(args, folder, model)
            return
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

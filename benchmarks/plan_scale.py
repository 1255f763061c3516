"""The epoch plan and the shard plan at a billion samples and 1,024 ranks: what the real functions cost.

    python benchmarks/plan_scale.py --samples 1000000000 --ranks 1024

Each rank plans for itself and alone, so a few ranks stand for all; each is a process of its own. Memory is
what planning adds to the process's peak, after torch and numpy are imported. Fails when a rank needs more
than 50 MB or when the start of an epoch or a resume takes more than a second.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from itertools import islice, pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from serve.shards import Shard  # noqa: E402
from train.data.loader import EpochPlan  # noqa: E402

MAX_MEGABYTES, MAX_SECONDS = 50, 1.0
IMAGES_PER_RANK = 32  # of one step
STEPS = 200


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure_rank(samples: int, ranks: int, rank: int) -> dict[str, float]:
    """Start of an epoch, a resume in its middle and at its end, and the batches after it."""
    plan = EpochPlan(samples, IMAGES_PER_RANK * ranks, 0, rank, ranks)
    before = peak_megabytes()
    values = {}
    for name, first_step in (("start", 0), ("middle", plan.steps // 2), ("end", plan.steps - 1)):
        started = time.perf_counter()
        batches = plan.batches(1, first_step)
        next(batches)
        values[name] = time.perf_counter() - started
    started = time.perf_counter()
    count = sum(1 for _ in islice(plan.batches(2, plan.steps // 2), STEPS))
    values["batch"] = (time.perf_counter() - started) / count
    values["megabytes"] = peak_megabytes() - before
    return values


def measure_shards(samples: int, shards: int) -> float:
    """Seconds for the rows of all shards; they must be neighbours that cover every input."""
    started = time.perf_counter()
    rows = [Shard(index, shards).rows(samples, IMAGES_PER_RANK) for index in range(shards)]
    seconds = time.perf_counter() - started
    assert rows[0].start == 0
    assert rows[-1].stop == samples
    assert all(one.stop == other.start for one, other in pairwise(rows))
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**9)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--rank", type=int, help="measure this one, in this process; prints JSON")
    args = parser.parse_args()
    if args.rank is not None:
        print(json.dumps(measure_rank(args.samples, args.ranks, args.rank)))
        return 0

    print(f"{args.samples:,} samples, {args.ranks:,} ranks, {IMAGES_PER_RANK} images a rank and step\n")
    print("| rank | start of an epoch, ms | resume in the middle, ms | at the end, ms | a batch, ms | MB |")
    print("|---|---|---|---|---|---|")
    good = True
    for rank in sorted({0, args.ranks // 2, args.ranks - 1}):
        command = [sys.executable, __file__, "--samples", str(args.samples), "--ranks", str(args.ranks)]
        done = subprocess.run([*command, "--rank", str(rank)], check=True, capture_output=True, text=True)
        v = json.loads(done.stdout)
        times = [v[name] for name in ("start", "middle", "end")]
        cells = " | ".join(f"{1000 * seconds:.2f}" for seconds in (*times, v["batch"]))
        print(f"| {rank} | {cells} | {v['megabytes']:.1f} |", flush=True)
        good &= v["megabytes"] < MAX_MEGABYTES and max(times) < MAX_SECONDS
    seconds = measure_shards(args.samples, args.ranks)
    print(f"\nshard plan of {args.ranks:,} shards: {1000 * seconds:.1f} ms in all, no memory")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Time the end of an epoch on synthetic answers: metrics, and what is written of the best epoch.

    python benchmarks/epoch_end.py [--images 50000] [--classes 1000] [--skill 8] [--root TREE]

Prints seconds and the peak of memory. `--root` measures another checkout.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


def timed(name: str, call: Callable[[], object]) -> object:
    began, cpu = time.perf_counter(), time.process_time()
    result = call()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(
        f"{name}: {seconds:.2f} s ({cpu:.2f} s of processors), peak so far {peak:.2f} GiB",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--skill", type=float, default=8.0, help="by so much the right logit is higher")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    args = parser.parse_args()
    sys.path.insert(0, str(args.root))
    from train.evaluation.metrics import evaluate_logits
    from train.evaluation.predictions import StoredAnswers, finish_predictions

    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, args.classes, args.images)
    logits = 2 * rng.standard_normal((args.images, args.classes), np.float32)
    logits[np.arange(args.images), labels] += args.skill
    names = tuple(f"class{i}" for i in range(args.classes))
    paths = [f"{names[label]}/{i}.jpg" for i, label in enumerate(labels)]
    answers = StoredAnswers(paths, labels, names, logits, 1.5)
    evaluate_logits(logits[:500], labels[:500] % 2, names)  # imports
    timed("metrics", lambda: evaluate_logits(logits, labels, names))
    with tempfile.TemporaryDirectory() as folder:
        timed("arrays, in the background", lambda: answers.save(Path(folder)))
        timed("table, once at the end", lambda: finish_predictions(Path(folder)))
        sizes = {path.name: f"{path.stat().st_size / 1e6:.1f} MB" for path in Path(folder).iterdir()}
        print(sizes)


if __name__ == "__main__":
    main()

"""What MLflow and snapshots cost a training step: step times with and without, in turn.

    python benchmarks/overhead.py mlflow
    python benchmarks/overhead.py snapshots --data PHOTOGRAPHS

mlflow: a process that trains on processor 0, and a server on processor 1 that is there, frozen (SIGSTOP)
from the second epoch on, killed and started again all the time, or absent from the start; against --track
false. "Added" is the difference to the quiet run of the same turn, of the median and the 99th percentile.

snapshots: ResNet-18 with --snapshot-minutes 1 against 0; steps in the same time.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.chaos import Server
from benchmarks.jobs import SMALL
from train.data.sample import make_sample
from train.tracking.base import read_metrics

CONDITIONS = ("quiet", "server", "frozen", "restarted", "absent")
STEPS = 21  # of an epoch: 170 images in batches of 8
LEFT_OUT = 3  # the first steps of an epoch, in which its loader begins


def child(times: Path, arguments: list[str]) -> None:
    """A training run that notes when each of its steps ended."""
    from train import main
    from train.engine import loop

    ended: list[list[float]] = []

    class Noting(loop.ProgressBar):
        def __init__(self, *arguments: object) -> None:
            ended.append([])
            super().__init__(*arguments)  # type: ignore[arg-type]

        def advance(self, count: int) -> None:
            ended[-1].append(time.perf_counter())
            super().advance(count)

    loop.ProgressBar = Noting  # type: ignore[misc]
    sys.argv[1:] = arguments
    try:
        main.main()
    finally:
        times.write_text(json.dumps(ended))


def start(
    folder: Path, name: str, settings: list[str], uri: str, processor: int | None
) -> subprocess.Popen:
    command = [sys.executable, __file__, "child", "--times", str(folder / f"{name}.json"), "--"]
    command += [*settings, "--name", name, "--output", str(folder / "runs")]
    return subprocess.Popen(
        command,
        env=os.environ | {"MLFLOW_TRACKING_URI": uri},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        preexec_fn=None if processor is None else lambda: os.sched_setaffinity(0, {processor}),
    )


def step_seconds(folder: Path, name: str) -> np.ndarray:
    """Without the first epoch and the first steps of each."""
    epochs = json.loads((folder / f"{name}.json").read_text())[1:]
    return np.concatenate([np.diff(epoch)[LEFT_OUT:] for epoch in epochs])


def under(
    condition: str, server: Server, running: Callable[[], bool], second_epoch: Callable[[], bool]
) -> None:
    """Do to the server what the condition says, until the run has ended."""
    while running() and not second_epoch():
        time.sleep(0.05)
    if condition == "frozen":
        server.all(signal.SIGSTOP)
    while running():
        if condition == "restarted":
            server.restart()
            os.sched_setaffinity(server.process.pid, {1})
        time.sleep(0.5)
    if condition == "frozen":
        server.all(signal.SIGCONT)


def mlflow(args: argparse.Namespace) -> None:
    added: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CONDITIONS}
    same: dict[str, list[bool]] = {name: [] for name in CONDITIONS}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        make_sample(folder / "sample", train_per_class=100, num_test=4)
        settings = ["--data", str(folder / "sample" / "train"), *SMALL, "--deterministic"]
        settings += ["--epochs", str(args.epochs), "--num-workers", "0"]
        os.sched_setaffinity(0, {1})
        server = Server(folder)
        address = f"http://127.0.0.1:{server.port}"
        time.sleep(20)
        for turn in range(args.turns):
            quiet = np.zeros(0)
            for condition in CONDITIONS:
                name = f"{condition}{turn}"
                uri = "http://127.0.0.1:9" if condition == "absent" else address
                more = ["--track", str(condition != "quiet").lower()]
                job = start(folder, name, [*settings, *more], uri, 0)
                rows = folder / "runs" / name / "metrics.jsonl"
                hurting = threading.Thread(
                    target=under,
                    args=(condition, server, lambda j=job: j.poll() is None, rows.exists),
                )
                hurting.start()
                assert job.wait() == 0
                hurting.join()
                if condition == "restarted":
                    time.sleep(15)
                seconds = step_seconds(folder, name)
                if condition == "quiet":
                    quiet = seconds
                if condition not in ("quiet", "absent"):
                    sync = [sys.executable, "train/sync.py", str(folder / "runs" / name)]
                    root = Path(__file__).resolve().parents[1]
                    env = os.environ | {"MLFLOW_TRACKING_URI": address}
                    subprocess.run(sync, cwd=root, env=env, check=True, stdout=subprocess.DEVNULL)
                    same[condition].append(rows_in(address, folder / "runs" / name) == plain_rows(rows))
                low, high = (np.percentile(seconds, p) - np.percentile(quiet, p) for p in (50, 99))
                added[condition].append((1000 * low, 1000 * high, 1000 * float(seconds.max())))
                median, high = np.percentile(seconds, [50, 99]) * 1000
                print(f"{name}: median {median:.2f} ms, p99 {high:.2f} ms, n = {len(seconds)}", flush=True)
        server.all(signal.SIGKILL)
    print("| server | added to the median, ms | added to the 99th percentile, ms | longest, ms | rows |")
    print("|---|---|---|---|---|")
    for condition, values in added.items():
        columns = [
            f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in zip(*values, strict=True)
        ]
        rows_same = f"{sum(same[condition])} of {len(same[condition])} equal" if same[condition] else ""
        print(f"| {condition} | {' | '.join(columns)} | {rows_same} |")


def plain_rows(path: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(path):
        for name, value in row.items():
            if name not in ("epoch", "time"):
                found.setdefault(name, []).append((int(row["epoch"]), value))
    return found


def rows_in(address: str, run: Path) -> dict[str, list[tuple[int, float]]]:
    """What the server has of a run, but for system metrics and the best epoch's, which come twice."""
    import mlflow as client_library

    client = client_library.MlflowClient(address)
    run_id = json.loads((run / "tracking.json").read_text())["run_id"]
    known = client.get_run(run_id).data.metrics
    names = [name for name in known if not name.startswith(("system/", "best/"))]
    return {n: [(m.step, m.value) for m in client.get_metric_history(run_id, n)] for n in names}


def snapshots(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rates: dict[str, list[float]] = {"0": [], "1": []}
        for turn in range(args.turns):
            for minutes in rates:
                name = f"snapshots{minutes}-{turn}"
                settings = ["--data", str(args.data), "--model", "resnet18", "--image-size", "64"]
                settings += ["--batch-size", "64", "--epochs", "1", "--track", "false"]
                settings += ["--near-duplicates", "false", "--val-fraction", "0.02", "--precision", "fp32"]
                job = start(folder, name, [*settings, "--snapshot-minutes", minutes], "", None)
                assert job.wait() == 0
                (epoch,) = json.loads((folder / f"{name}.json").read_text())
                rates[minutes].append((len(epoch) - 1) / (epoch[-1] - epoch[0]))
                print(
                    f"{name}: {rates[minutes][-1]:.3f} steps/s in {epoch[-1] - epoch[0]:.0f} s", flush=True
                )
        ratios = [on / off for off, on in zip(rates["0"], rates["1"], strict=True)]
        listed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"with a snapshot every minute against none: {statistics.median(ratios):.3f} ({listed})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("mlflow", "snapshots", "child"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=25, help="of mlflow")
    parser.add_argument("--data", type=Path, help="of snapshots: labelled photographs")
    parser.add_argument("--times", type=Path, help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.what == "child":
        child(args.times, [value for value in rest if value != "--"])
        return
    {"mlflow": mlflow, "snapshots": snapshots}[args.what](args)


if __name__ == "__main__":
    main()

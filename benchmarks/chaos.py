"""Hurt one training run again and again, at random; it must end as if nothing had happened.

    python benchmarks/chaos.py --faults 20 [--data PHOTOGRAPHS --epochs 4]

Faults, drawn with --seed: SIGKILL of a rank, of torchrun; SIGTERM to a rank, to torchrun; a rank that hangs
(SIGSTOP); the newest snapshot cut off or with a flipped bit while nobody trains; the MLflow server killed
and started again, or frozen for a while. Whenever the job is gone, the same command is given again.

Exit code: 0 when the final weights' sha256 is that of a quiet run, MLflow has one run, FINISHED, and each
epoch of each metric in it once.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlflow
import psutil

from benchmarks.jobs import EXACT, SMALL, TrainingJob, weights_sha256
from train.data.sample import make_sample
from train.runs.snapshots import list_snapshots
from train.tracking.base import read_metrics


class Server:
    """An MLflow server with SQLite, on a port of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--serve-artifacts"]
        store += ["--artifacts-destination", str(self.folder / "artifacts"), "--workers", "1"]
        with (self.folder / "server.log").open("ab") as output:
            self.process = psutil.Popen(
                [sys.executable, "-m", "mlflow", "server", *store, "--port", str(self.port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )

    def all(self, number: int) -> None:
        for process in [*self.process.children(recursive=True), self.process]:
            with suppress(psutil.Error):
                process.send_signal(number)

    def restart(self) -> None:
        self.all(signal.SIGKILL)
        self.process.wait()
        time.sleep(2)
        self.start()

    def freeze(self) -> None:
        self.all(signal.SIGSTOP)
        time.sleep(15)
        self.all(signal.SIGCONT)


def cut_off(folder: Path, draw: random.Random) -> None:
    newest = list_snapshots(folder / "checkpoints")[0]
    os.truncate(newest, draw.randrange(newest.stat().st_size))


def flip_a_bit(folder: Path, draw: random.Random) -> None:
    newest = list_snapshots(folder / "checkpoints")[0]
    data = bytearray(newest.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    newest.unlink()  # last.pt may be another name of it
    newest.write_bytes(data)


def hurt(job: TrainingJob, server: Server, kind: str, draw: random.Random) -> None:
    """Whatever is under way; returns when it is done."""
    if kind == "kill agent" or kind.startswith("damage"):
        ranks = job.ranks()
        job.agent.kill()
        psutil.wait_procs(ranks, 60)
        if kind.startswith("damage") and len(list_snapshots(job.folder / "checkpoints")) > 1:
            (cut_off if kind == "damage: cut off" else flip_a_bit)(job.folder, draw)
        return
    rank = draw.randrange(2)
    actions: dict[str, Callable[[], None]] = {
        "kill rank": lambda: job.kill(rank),
        "stop rank": lambda: job.kill(rank, signal.SIGTERM),
        "hang rank": lambda: job.kill(rank, signal.SIGSTOP),
        "stop agent": job.agent.terminate,
        "kill server": server.restart,
        "freeze server": server.freeze,
    }
    with suppress(psutil.Error, IndexError):  # it was restarting: the fault found nobody
        actions[kind]()


KINDS = ("kill rank", "stop rank", "hang rank", "kill agent", "stop agent")
KINDS += ("damage: cut off", "damage: flipped bit", "kill server", "freeze server")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=40, help="enough that all faults find it training")
    parser.add_argument("--data", type=Path, help="labelled images; default: 80 drawn ones")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        if args.data is None:
            make_sample(root / "sample", train_per_class=40, num_test=4)
        data = (args.data or root / "sample" / "train").resolve()
        settings = ["--data", data, *SMALL, *EXACT, "--epochs", args.epochs, "--hang-minutes", 0.1]
        if args.data is not None:
            settings += ["--batch-size", 64]
        with TrainingJob(root, *settings, "--name", "quiet", "--track", "false") as job:
            assert job.wait(3600) == 0, job.printed()
        quiet = weights_sha256(job.folder)
        rows = read_metrics(job.folder / "metrics.jsonl")
        server = Server(root)
        address = f"http://127.0.0.1:{server.port}"
        environment = {"MLFLOW_TRACKING_URI": address}
        done: Counter[str] = Counter()
        starts = 0
        # each kind once before any comes twice
        kinds = [
            kind for _ in range(-(-args.faults // len(KINDS))) for kind in draw.sample(KINDS, len(KINDS))
        ]
        kinds = kinds[: args.faults]
        try:
            while True:
                starts += 1
                with TrainingJob(
                    root,
                    *settings,
                    "--name",
                    "hurt",
                    restarts=3,
                    environment={"MLFLOW_TRACKING_URI": address},
                ) as job:
                    while kinds and job.agent.poll() is None:
                        place = job.place()
                        while job.place() <= place and job.agent.poll() is None:
                            time.sleep(0.05)  # some new step first
                        if job.agent.poll() is not None:
                            break
                        time.sleep(draw.uniform(0, 2))
                        kind = kinds.pop(0)
                        hurt(job, server, kind, draw)
                        done[kind] += 1
                        print(f"fault {sum(done.values())}: {kind} at {job.place()}", flush=True)
                    code = job.wait(3600)
                    print(f"start {starts} ended with exit code {code}", flush=True)
                    if code == 0:
                        break
                    assert starts <= 2 * args.faults + 2, job.printed()
            same = weights_sha256(job.folder) == quiet
            synced = subprocess.run(
                [sys.executable, "train/sync.py", str(job.folder)],
                cwd=Path(__file__).resolve().parents[1],
                env=os.environ | environment,
                check=False,
            ).returncode
            client = mlflow.MlflowClient(address)
            runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
            once = all(
                [m.step for m in client.get_metric_history(run.info.run_id, name)]
                == list(range(1, len(rows) + 1))
                for run in runs
                for name in ("train/loss", "val/loss", "val/accuracy", "lr")
            )
        finally:
            server.all(signal.SIGKILL)
    status = [run.info.status for run in runs]
    print(
        f"{sum(done.values())} faults of {len(done)} kinds, {starts} starts; weights "
        f"{'equal' if same else 'DIFFER'}; MLflow runs {status}, each metric step once: {once}, "
        f"sync.py {synced}"
    )
    return int(not (same and once and status == ["FINISHED"] and not kinds))


if __name__ == "__main__":
    sys.exit(main())

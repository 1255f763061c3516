"""Several nodes on one machine, in network namespaces: what is lost when one dies or the network does?

    sudo python benchmarks/nodes.py --nodes 2

Each node is a network namespace with a torchrun agent, started through k8s/entrypoint.sh as in a pod, which
starts its agent anew when that has failed. They meet through c10d rendezvous over virtual cables (veth) and
a bridge, and share the file system. As the Job controller does, a node whose processes are all gone is
started again with the same arguments, after a pause that grows with each. One run is left alone; in the
other, faults strike after given epochs:

    rank        one rank of the last node is killed with SIGKILL
    killed      every process of the last node, its pod
    first       the same with the node that hosts the rendezvous
    cut         the last node's cable is out for some seconds
    power       the cable is out, the processes are gone without a word to the others, the cable is in

Prints for each fault the time until the next epoch was done and how many pods were started again, and
compares the weights of the two runs. Needs root and iproute2; without, prints that and does nothing.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train.checkpoint import load_checkpoint  # noqa: E402
from train.data.sample import make_sample  # noqa: E402

PREFIX = f"purebred{os.getpid()}"
HUB = f"{PREFIX}-hub"
PORT = 29400
FAULTS = ("rank", "killed", "first", "cut", "power")
PAUSES = {  # seconds until a pod that failed is replaced, the last one from then on
    "job": (20, 40, 160, 600),  # the Job controller's, measured
    "jobset": (3,),
}
CUT_SECONDS = 5
SETTINGS = [
    *(
        "--model",
        "simple_cnn",
        "--image-size",
        "32",
        "--batch-size",
        "32",
        "--optimizer",
        "adamw",
        "--lr",
        "2e-3",
        "--precision",
        "fp32",
    ),
    *("--deterministic", "--track", "false", "--num-workers", "0"),
]


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@contextlib.contextmanager
def network(nodes: int) -> Iterator[None]:
    """Namespaces PREFIX-0, ... with the addresses 10.77.0.1, ... on a bridge."""
    names = [HUB, *(f"{PREFIX}-{node}" for node in range(nodes))]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", HUB, "link", "add", "bridge", "type", "bridge")
        ip("-n", HUB, "link", "set", "bridge", "up")
        for node in range(nodes):
            name = f"{PREFIX}-{node}"
            ip(
                "-n",
                HUB,
                "link",
                "add",
                f"node{node}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                name,
            )
            ip("-n", HUB, "link", "set", f"node{node}", "master", "bridge", "up")
            ip("-n", name, "address", "add", f"{address(node)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                kill_all(name)
                ip("netns", "delete", name)


def address(node: int) -> str:
    return f"10.77.0.{node + 1}"


def kill_all(namespace: str) -> None:
    """torchrun's workers have sessions of their own; the namespace knows them all."""
    for pid in ip("netns", "pids", namespace).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def worker(namespace: str) -> int:
    """A rank's process: the program itself, not the agent that has it among its arguments."""
    for pid in ip("netns", "pids", namespace).split():
        command = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
        if b"train/main.py" in command and b"train.launch" not in command:
            return int(pid)
    raise RuntimeError(f"no rank runs in {namespace}")


@dataclass
class Job:
    """A training run on all nodes, and the controller that starts failed nodes again."""

    data: Path
    runs: Path
    name: str
    nodes: int
    epochs: int
    pauses: tuple[int, ...] = PAUSES["job"]
    starts: dict[int, int] = field(default_factory=dict)
    given_up: threading.Event = field(default_factory=threading.Event)

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    def epochs_done(self) -> int:
        path = self.folder / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def command(self, node: int) -> list[str]:
        return [
            # a core each: two nodes that both start a thread for every core would wait for one another
            *("taskset", "--cpu-list", str(node % (os.cpu_count() or 1))),
            *("ip", "netns", "exec", f"{PREFIX}-{node}", str(ROOT / "k8s" / "entrypoint.sh"), "train"),
            *(f"--nnodes={self.nodes}", "--nproc-per-node=1", "--max-restarts=0", "--rdzv-backend=c10d"),
            *(f"--rdzv-id={self.name}", f"--rdzv-endpoint={address(0)}:{PORT}"),
            *(f"--rdzv-conf=is_host={str(node == 0).lower()}", f"--local-addr={address(node)}"),
            *("train/main.py", f"--data={self.data}", f"--output={self.runs}", f"--name={self.name}"),
            *(f"--epochs={self.epochs}", *SETTINGS),
        ]

    def run_node(self, node: int, tries: int = 20) -> None:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "RUNS": str(self.runs),
            "RUN_NAME": self.name,
            "RESTARTS": "20",
        }
        with (self.runs / f"{self.name}-{node}.log").open("ab") as log:
            while not self.given_up.is_set():
                self.starts[node] = self.starts.get(node, 0) + 1
                done = subprocess.run(
                    self.command(node), cwd=ROOT, env=environment, stdout=log, stderr=log, check=False
                )
                if done.returncode == 0:
                    return
                if self.starts[node] == tries:
                    self.given_up.set()
                failed = sum(self.starts.values()) - self.nodes  # pods before this one
                self.given_up.wait(self.pauses[min(failed, len(self.pauses) - 1)])

    def strike(self, fault: str) -> None:
        last = self.nodes - 1
        if fault == "rank":
            os.kill(worker(f"{PREFIX}-{last}"), signal.SIGKILL)
        elif fault == "killed":
            kill_all(f"{PREFIX}-{last}")
        elif fault == "first":
            kill_all(f"{PREFIX}-0")
        else:
            ip("-n", HUB, "link", "set", f"node{last}", "down")
            time.sleep(1)
            if fault == "power":
                kill_all(f"{PREFIX}-{last}")
            time.sleep(CUT_SECONDS - 1)
            ip("-n", HUB, "link", "set", f"node{last}", "up")

    def run(self, faults: dict[int, str], limit: float) -> float:
        """Faults strike after that many epochs. Seconds it took; RuntimeError: it did not end."""
        started = time.perf_counter()
        controllers = [threading.Thread(target=self.run_node, args=(node,)) for node in range(self.nodes)]
        for controller in controllers:
            controller.start()
        try:
            pending = sorted(faults.items())
            while any(controller.is_alive() for controller in controllers):
                if self.given_up.is_set() or time.perf_counter() - started > limit:
                    raise RuntimeError(f"{self.name} did not end: see {self.runs}/*.log")
                if pending and self.epochs_done() >= pending[0][0]:
                    self.report(pending.pop(0)[1], limit)
                time.sleep(0.02)
        finally:
            self.given_up.set()
            for node in range(self.nodes):
                kill_all(f"{PREFIX}-{node}")
            for controller in controllers:
                controller.join()
        return time.perf_counter() - started

    def report(self, fault: str, limit: float) -> None:
        struck, before, starts = time.perf_counter(), self.epochs_done(), sum(self.starts.values())
        self.strike(fault)
        after_strike = self.epochs_done()
        while self.epochs_done() <= max(before, after_strike) and not self.given_up.is_set():
            if time.perf_counter() - struck > limit:
                raise RuntimeError(f"no epoch in {limit:.0f} s after {fault!r}: see {self.runs}/*.log")
            time.sleep(0.02)
        seconds, again = time.perf_counter() - struck, sum(self.starts.values()) - starts
        print(f"| {fault} | {before} | {seconds:.1f} | {again} |", flush=True)


def epochs_in_order(job: Job) -> bool:
    rows = [json.loads(line)["epoch"] for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    return rows == list(range(1, job.epochs + 1))


def same_weights(one: Job, other: Job) -> bool:
    a, b = (load_checkpoint(job.folder / "checkpoints" / "last.pt")["model"] for job in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def why_not() -> str:
    """Why there are no namespaces to be had; "": there are."""
    if shutil.which("ip") is None:
        return "the command ip (iproute2) is not installed"
    try:
        with network(1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument(
        "--controller", choices=PAUSES, default="job", help="whose pauses; default: %(default)s"
    )
    parser.add_argument("--limit", type=float, default=900, help="seconds for a run; default: %(default)g")
    parser.add_argument("--keep", type=Path, help="folder for runs and logs; default: a temporary one")
    args = parser.parse_args()
    for ending in (signal.SIGTERM, signal.SIGINT):  # the namespaces go in any case
        signal.signal(ending, lambda number, frame: sys.exit(128 + number))
    if reason := why_not():
        print(f"skipped: no network namespaces here: {reason}")
        return 0
    step = args.epochs // (len(args.faults) + 1)
    faults = {step * (place + 1): fault for place, fault in enumerate(args.faults)}
    with tempfile.TemporaryDirectory() as temporary, network(args.nodes):
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_sample(folder / "sample", train_per_class=100, num_test=2)
        data = folder / "sample" / "train"
        quiet = Job(data, folder, "quiet", args.nodes, args.epochs)
        print(f"quiet run: {quiet.run({}, args.limit):.1f} s\n", flush=True)
        print("| fault | after epoch | seconds to the next epoch | pods started again |\n|---|---|---|---|")
        struck = Job(data, folder, "struck", args.nodes, args.epochs, PAUSES[args.controller])
        seconds = struck.run(faults, args.limit)
        ordered, same = epochs_in_order(struck), same_weights(quiet, struck)
        print(f"\nrun with {len(faults)} faults: {seconds:.1f} s; each epoch once: {ordered}; "
              f"weights equal to the quiet run's: {same}")  # fmt: skip
    return 0 if ordered and same else 1


if __name__ == "__main__":
    sys.exit(main())

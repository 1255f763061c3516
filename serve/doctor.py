"""Look before the work starts: is this machine or container what the job needs?

    python -m serve.doctor --write /runs --read /data --free 5 --shm 512 --mlflow http://mlflow:5000

A line for each check: ok, warning (slower, or less is kept) or error (the job would fail).

Exit code: 0 nothing stands against the job; 1 something does that may pass, such as a full disk;
2 something that the same call will meet again, such as a missing folder, or unusable arguments.
"""

import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not serve/, belongs on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import errno
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import onnxruntime as ort

from serve.contract.command_line import CommandLine, Number
from serve.contract.errors import UserError
from serve.contract.files import atomic_write
from serve.contract.interrupts import end_on_signal
from serve.contract.urls import is_http, is_remote, redact
from serve.local_copy import resolve_model
from serve.mlflow_models import is_mlflow_model
from serve.predictor import Predictor
from serve.processors import available_processors, cpu_quota
from serve.providers.registry import ALL_PRECISIONS, PROVIDERS
from serve.tracking_server import TrackingServer

# a path or a right that is missing; a store that is away has other errors
LASTING = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)
CONTAINER_DEFAULT_SHM = 64  # MiB, what container runtimes mount by default
RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "warning", "error"]
    about: str
    message: str
    lasting: bool = False  # the same job will meet it again on any machine

    def __str__(self) -> str:
        return redact(f"{self.level:7} {self.about}: {self.message}")


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine("serve/doctor.py", __doc__, "[--write DIR] [--read PATH] [options]")
    add = parser.add_argument
    add("--write", action="append", default=[], metavar="DIR", help="the job writes here")
    add("--read", action="append", default=[], metavar="PATH", help="the job reads this folder or file")
    add("--free", type=Number(float), default=1.0, metavar="GIB", help="free disk below --write")
    add("--shm", type=Number(float), default=0.0, metavar="MIB", help="shared memory that the job needs")
    add(
        "--threads",
        type=Number(int),
        default=0,
        metavar="N",
        help="threads of each process; 0: as many as it finds",
    )
    add(
        "--processes",
        type=Number(int, 1),
        metavar="N",
        help="of torchrun: they meet under the machine's own name",
    )
    add("--provider", choices=("auto", *PROVIDERS), default="auto", help="onnxruntime's")
    add("--precision", choices=ALL_PRECISIONS, default="fp32", help="of the provider")
    add("--model", help="open this model, as --model of serve/main.py; not tried when it is a URL")
    add("--mlflow", default="", metavar="URI", help="tracking server that should answer")
    add("--resolve", action="append", default=[], metavar="HOST", help="this name should have an address")
    add(
        "--wait",
        type=Number(float),
        default=0.0,
        metavar="SECONDS",
        help="for the server and names; 0: no wait",
    )
    add("--strict", action="store_true", help="a warning is an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code, as in the module's docstring."""
    args = build_parser().parse_args(argv)
    deadline = time.monotonic() + args.wait
    worst = 0
    for finding in examine(args, deadline):
        print(finding, flush=True)
        if finding.level == "error" or (args.strict and finding.level == "warning"):
            worst = max(worst, 2 if finding.lasting else 1)
    return worst


def examine(args: argparse.Namespace, deadline: float) -> Iterator[Finding]:
    yield shared_memory(args.shm)
    yield processors(args.threads, args.processes or 1)
    yield onnxruntime_provider(args.provider, args.precision, args.model)
    for folder in args.write:
        yield writable(folder, args.free)
    for path in args.read:
        yield readable(path)
    if args.processes:
        yield own_name(socket.getfqdn())
    for host in args.resolve:
        yield resolves(host, deadline)
    if args.mlflow:
        yield mlflow_server(args.mlflow, deadline)


def shared_memory(wanted: float, path: Path = Path("/dev/shm")) -> Finding:
    """Check for `wanted` MiB. Loader processes and nccl pass data through it: SIGBUS when it is full."""
    try:
        size = shutil.disk_usage(path).total / 2**20
    except OSError as error:
        return Finding("error" if wanted else "warning", "shared memory", f"{path}: {error.strerror}")
    if size < wanted:
        way_out = "mount an emptyDir with medium: Memory there, or docker run --shm-size"
        return Finding(
            "error", "shared memory", f"{size:.0f} MiB, {wanted:.0f} are needed: {way_out}", True
        )
    if not wanted and size <= CONTAINER_DEFAULT_SHM:
        return Finding("warning", "shared memory", f"{size:.0f} MiB, too little for loader processes")
    return Finding("ok", "shared memory", f"{size:.0f} MiB")


def processors(threads: int, processes: int, root: Path = Path("/")) -> Finding:
    """Warn of more threads than processors: with a quota, they wait until the next period."""
    available, quota = available_processors(root), cpu_quota(root)
    limit = "" if quota is None else f" (quota {quota:g})"
    if not threads:
        variable = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(variable) if variable.isdecimal() and int(variable) else 1
    running = threads * processes
    if running > available:
        started = f"{processes} processes x {threads} threads"
        return Finding("warning", "processors", f"{available} available{limit}, {started}: they will wait")
    return Finding("ok", "processors", f"{available} available{limit}")


def onnxruntime_provider(provider: str, precision: str, model: str | None) -> Finding:
    """Open the model, if one is given: onnxruntime lists what it was built for, not what it can use."""
    listed = ", ".join(name.removesuffix("ExecutionProvider") for name in ort.get_available_providers())
    if model is None or is_remote(model):
        why = "no --model" if model is None else f"{model} is remote"
        return Finding("ok", "onnxruntime", f"{ort.__version__}, built for {listed} (not tried: {why})")
    try:
        with resolve_model(model) as opened:
            predictor = Predictor(opened.path, provider, 1, precision)
    except (ValueError, OSError) as error:
        missing = not is_mlflow_model(model) and not Path(model).exists()  # a server may be away
        return Finding("error", "onnxruntime", str(error), missing)
    where = f"{predictor.provider} at {predictor.precision}, {predictor.share}"
    return Finding("ok", "onnxruntime", f"{ort.__version__}, {opened.described(model)} runs on {where}")


def writable(output: str | Path, free: float) -> Finding:
    """Do what every output of the project does: write a temporary file, flush it, rename it.

    For a folder that does not exist, the nearest one above it is checked. `free` in GiB. URLs are left
    to the job.
    """
    about = f"write {output}"
    if is_remote(str(output)):
        return Finding("ok", about, "remote, not tried")
    folder = Path(output)
    try:
        nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        with (
            tempfile.TemporaryDirectory(prefix=".doctor-", dir=nearest) as scratch,
            atomic_write(Path(scratch, "a")) as file,
        ):
            file.write(b"doctor")
        gib = shutil.disk_usage(nearest).free / 2**30
    except OSError as error:
        who = f"user {os.getuid()}, groups {','.join(map(str, os.getgroups()))}"
        text = f"{error.strerror} ({who}): mount a volume, and set fsGroup"
        return Finding("error", about, text, error.errno in LASTING)
    if gib < free:
        return Finding("error", about, f"{gib:.1f} GiB free, {free:g} are needed")
    where = "" if nearest == folder.absolute() else f" in {nearest}"
    return Finding("ok", about, f"{gib:.1f} GiB free{where}")


def readable(path: str) -> Finding:
    """Check that a folder holds something, a file a byte. URLs are left to the job."""
    about = f"read {path}"
    if is_remote(path):
        return Finding("ok", about, "remote, not tried")
    try:
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                empty = next(entries, None) is None
        else:
            with open(path, "rb") as file:
                empty = not file.read(1)
    except OSError as error:
        return Finding("error", about, f"{error.strerror} (user {os.getuid()})", error.errno in LASTING)
    if empty:
        return Finding("error", about, "it is empty", lasting=True)
    return Finding("ok", about, "readable")


def resolves(host: str, deadline: float) -> Finding:
    """Look the name up until the deadline: in a cluster it follows its pod by seconds."""

    def attempt() -> Finding:
        try:
            addresses = sorted({str(found[4][0]) for found in socket.getaddrinfo(host, None)})
        except (OSError, UnicodeError) as error:  # UnicodeError: a label that is empty or too long
            text = f"{error}: it needs a headless Service, and the pod's subdomain must name it"
            return Finding("error", f"name {host}", text)
        return Finding("ok", f"name {host}", ", ".join(addresses))

    return until(deadline, attempt)


def own_name(host: str) -> Finding:
    """Check that `host` leads to this machine: torchrun's processes meet there, and wait minutes for it."""
    about = f"own name {host}"
    way_out = (
        "give the container a host name of its /etc/hosts, or torchrun --local-addr=127.0.0.1 on one node"
    )
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return Finding("error", about, f"{error}: {way_out}")
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return Finding("ok", about, str(address[0]))
    return Finding("error", about, f"{found[0][4][0]} is another machine's address: {way_out}")


def mlflow_server(uri: str, deadline: float) -> Finding:
    """Warn at most: training continues without the server and sends later what was missed."""

    def attempt() -> Finding:
        try:
            TrackingServer(uri).check()
        except (UserError, OSError) as error:
            return Finding("warning", f"MLflow {uri}", f"{error}; what it misses is sent later")
        return Finding("ok", f"MLflow {uri}", "answers")

    if not is_http(uri):
        return Finding("ok", f"MLflow {uri}", "no server, not tried")
    return until(deadline, attempt)


def until(deadline: float, attempt: Callable[[], Finding]) -> Finding:
    """Return the first ok, or what was found last when time is up."""
    while (finding := attempt()).level != "ok" and time.monotonic() < deadline:
        time.sleep(RETRY_SECONDS)
    return finding


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())

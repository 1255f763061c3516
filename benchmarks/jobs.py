"""Start real training jobs, find their processes, hurt them, and compare what is left."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from train.checkpoint import load_checkpoint  # noqa: E402
from train.runs.snapshots import list_snapshots  # noqa: E402

SMALL = ["--model", "simple_cnn", "--image-size", "32", "--batch-size", "8"]
SMALL += ["--optimizer", "adamw", "--lr", "2e-3"]
EXACT = ["--precision", "fp32", "--deterministic", "--snapshot-steps", "1", "--ema", "0.99"]


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Look until a condition holds; raise AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s"
        time.sleep(0.02)


class Job:
    """A training job whose ranks are processes of this machine; ended, whatever happens, on leaving."""

    def __init__(self, cwd: Path, arguments: Sequence[object]):
        self.cwd = cwd
        cwd.mkdir(parents=True, exist_ok=True)
        name = str(arguments[arguments.index("--name") + 1]) if "--name" in arguments else "job"
        self.folder = cwd / "runs" / name
        self.log = cwd / f"{name}.log"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Kill what is left of the job."""
        raise NotImplementedError

    def ranks(self) -> list[psutil.Process]:
        """Return the training processes, in the order of their ranks."""
        raise NotImplementedError

    def ended(self) -> bool:
        raise NotImplementedError

    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def place(self) -> tuple[int, int]:
        """Return (epochs done, steps of the next) of the newest snapshot."""
        found = list_snapshots(self.folder / "checkpoints")
        if not found:
            return (0, 0)
        _, epoch, _, step = found[0].stem.split("-")
        return (int(epoch), int(step))

    def wait_for(self, epoch: int, step: int, seconds: float = 240) -> None:
        """Wait until a snapshot of there, or later, is written."""
        self.wait_until(lambda: self.place() >= (epoch, step), f"epoch {epoch} step {step}", seconds)

    def wait_for_text(self, text: str, seconds: float = 240) -> None:
        self.wait_until(lambda: text in self.printed(), repr(text), seconds)

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
        """Wait for a condition; raise AssertionError with what was printed if the job ends without it."""
        wait_until(lambda: condition() or self.ended(), seconds)
        assert condition(), f"no {what}:\n{self.printed()}"

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        self.ranks()[rank].send_signal(number)


class TrainingJob(Job):
    """`torchrun --nproc_per_node=N train/main.py ...` in a folder."""

    def __init__(
        self,
        cwd: Path,
        *arguments: object,
        processes: int = 2,
        restarts: int = 0,
        environment: dict[str, str] | None = None,
        agent: Sequence[str] = ("--standalone",),
    ):
        super().__init__(cwd, arguments)
        torchrun = [sys.executable, "-m", "torch.distributed.run", *agent]
        command = [*torchrun, f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        with self.log.open("ab") as output:
            self.agent = psutil.Popen(
                [*command, str(ROOT / "train" / "main.py"), *map(str, arguments)],
                cwd=cwd,
                env=clean | (environment or {}),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def end(self) -> None:
        family = self.children() if self.agent.is_running() else []
        for process in [self.agent, *family]:
            with suppress(psutil.Error):
                process.kill()

    def children(self) -> list[psutil.Process]:
        with suppress(psutil.Error):
            found: list[psutil.Process] = self.agent.children(recursive=True)
            return found
        return []

    def ranks(self) -> list[psutil.Process]:
        found = {}
        for process in self.children():
            with suppress(psutil.Error, KeyError):
                if process.ppid() == self.agent.pid:
                    found[int(process.environ()["RANK"])] = process
        return [found[rank] for rank in sorted(found)]

    def attempt(self) -> int:
        """Return how often torchrun has restarted the ranks; -1 while there are none."""
        with suppress(psutil.Error, KeyError):
            return min((int(r.environ()["TORCHELASTIC_RESTART_COUNT"]) for r in self.ranks()), default=-1)
        return -1

    def ended(self) -> bool:
        return self.agent.poll() is not None

    def wait(self, seconds: float = 300) -> int:
        """The agent's exit code."""
        try:
            code: int = self.agent.wait(seconds)
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired) as error:
            raise AssertionError(f"still running after {seconds} s:\n{self.printed()}") from error
        return code


def weights_sha256(folder: Path) -> str:
    """Of weights, their average, the optimizer's state and the history at the end of the run."""
    state = load_checkpoint(folder / "checkpoints" / "last.pt")
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                feed(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                feed(item)
        elif hasattr(value, "numpy"):
            digest.update(value.contiguous().numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    feed([state[part] for part in ("model", "ema", "optimizer", "scheduler", "epoch", "history")])
    return digest.hexdigest()

"""Commands and ranks in processes forked from one that has imported the libraries.

Importing torch, torchvision, timm and MLflow takes five processor seconds, in each process that a command
or torchrun starts. Here it happens once for each worker of pytest; a fork takes 20 milliseconds. What
torchrun itself does (restarts, addresses, signals to its processes) is tested with torchrun, in
test_pipeline.py and test_faults.py.
"""

import atexit
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from benchmarks.jobs import ROOT, Job

PRELOAD = ["train.main", "export.main", "export.quantize", "serve.main", "serve.merge", "mlflow.onnx"]
PRELOAD += ["matplotlib.figure", "sklearn.metrics", "optuna", "sqlalchemy", "PIL.JpegImagePlugin"]
Function = Callable[..., object]


def _context() -> Any:
    """The server of forks, which imports PRELOAD before it forks for the first time."""
    context = multiprocessing.get_context("forkserver")
    if "PUREBRED_FORKS" not in os.environ:  # the server inherits the environment of now
        context.set_forkserver_preload(PRELOAD)
        os.environ |= {"PUREBRED_FORKS": "1", "OMP_NUM_THREADS": "1"}
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(ROOT)  # Python 3.11's server does not take over sys.path
        from multiprocessing import forkserver

        forkserver.ensure_running()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _enter(
    function: Function, arguments: tuple[Any, ...], cwd: str, environment: dict[str, str], log: str
) -> None:
    """Become a process of its own: environment, working directory, output; then call the function."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    code = 1
    try:
        outcome = function(*arguments)
        code = outcome if isinstance(outcome, int) else 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()  # which multiprocessing leaves out
    sys.stdout.flush()
    sys.exit(code)


def fork(
    function: Function, *arguments: Any, cwd: Path, log: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start `function(*arguments)` in a process of its own; an int that it returns is the exit code."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PYTHONPATH"))}
    environment = {**clean, **(environment or {})}
    process: BaseProcess = _context().Process(
        target=_enter, args=(function, arguments, str(cwd), environment, str(log)), daemon=False
    )
    process.start()
    return process


def call(program: str, arguments: Sequence[str]) -> object:
    """Run a command's main function, as `python PROGRAM ARGUMENTS` would."""
    sys.argv = [str(ROOT / program), *arguments]
    module = import_module(program.removesuffix(".py").replace("/", "."))
    return module.main() if program == "train/main.py" else module.main(list(arguments))


def execute(program: str, arguments: Sequence[str]) -> None:
    """Run a program's text, as `python -c PROGRAM ARGUMENTS` would."""
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


def run(program: str, *arguments: object, cwd: Path, code: int = 0, timeout: float = 120) -> str:
    """Run a command, such as "export/main.py"; check its exit code, and return what it printed."""
    log = cwd / f".{program.replace('/', '-')}.log"
    log.unlink(missing_ok=True)
    process = fork(call, program, [str(argument) for argument in arguments], cwd=cwd, log=log)
    process.join(timeout)
    printed = log.read_text(encoding="utf-8", errors="replace")
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{program} still ran after {timeout} s:\n{printed}")
    assert process.exitcode == code, printed
    return printed


def agent(processes: int) -> tuple[Any, list[dict[str, str]]]:
    """Hold the store of a job in this process, as torchrun does; return it and each rank's variables."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    return store, [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


class RankJob(Job):
    """`train/main.py` on several ranks without torchrun."""

    def __init__(
        self,
        cwd: Path,
        *arguments: object,
        processes: int = 2,
        environment: Mapping[str, str] | None = None,
    ):
        super().__init__(cwd, arguments)
        self.store, variables = agent(processes)
        texts = [str(argument) for argument in arguments]
        self.processes = [
            fork(
                call,
                "train/main.py",
                texts,
                cwd=cwd,
                log=self.log,
                environment=own | dict(environment or {}),
            )
            for own in variables
        ]

    def ranks(self) -> list[psutil.Process]:
        return [psutil.Process(process.pid) for process in self.processes]

    def ended(self) -> bool:
        return all(process.exitcode is not None for process in self.processes)

    def end(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
                process.join()

    def wait(self, seconds: float = 300) -> int:
        """Return the first exit code that is not 0; after it, end the other ranks as torchrun does."""
        deadline = time.monotonic() + seconds
        told = False
        while not self.ended():
            assert time.monotonic() < deadline, f"still running after {seconds} s:\n{self.printed()}"
            if not told and any(process.exitcode for process in self.processes):
                told = True
                for process in self.processes:
                    if process.exitcode is None and process.pid:
                        os.kill(process.pid, signal.SIGTERM)
            multiprocessing.connection.wait([p.sentinel for p in self.processes if p.exitcode is None], 0.2)
        return next((process.exitcode for process in self.processes if process.exitcode), 0)


def train(processes: int, *arguments: object, cwd: Path, code: int = 0) -> str:
    """Train to the end; check the exit code of each rank, and return what they printed."""
    with RankJob(cwd, *arguments, processes=processes) as job:
        assert job.wait() == code, job.printed()
    return job.printed()


def _scenario(scenario: Function, ranks: Any, answer: str) -> None:
    import torch

    from train.distributed import process_group

    with process_group(ranks, torch.device("cpu")):
        Path(answer).write_bytes(pickle.dumps(scenario(ranks)))
        os._exit(0)  # a scenario may leave the group in disorder


def on_ranks(scenario: Function, processes: int, cwd: Path) -> list[Any]:
    """Return what `scenario(ranks)` returned on each rank of one process group."""
    from train.distributed import Ranks

    store, variables = agent(processes)
    answers = [cwd / f"rank{rank}" for rank in range(processes)]
    jobs = [
        fork(
            *(_scenario, scenario, Ranks(rank, rank, processes, processes), str(answers[rank])),
            cwd=cwd,
            log=cwd / "log",
            environment=own,
        )
        for rank, own in enumerate(variables)
    ]
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * processes, (cwd / "log").read_text()
    del store
    return [pickle.loads(answer.read_bytes()) for answer in answers]

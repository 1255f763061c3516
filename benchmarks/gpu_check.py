"""One line of benchmarks/gpu_check.sh: a check of training, export or scoring on a device.

    python benchmarks/gpu_check.py steps --device cpu --quick --scratch /tmp/check

The last line of output is the result. Exit code: 0; 1 if the check failed; 77 if it was skipped.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks import gpu_steps  # noqa: E402
from benchmarks.gpu_steps import Check, SkippedError, one_step  # noqa: E402
from benchmarks.jobs import Job, weights_sha256  # noqa: E402
from train.data.sample import make_sample  # noqa: E402
from train.distributed import Ranks, process_group, ranks_from_environment  # noqa: E402
from train.engine.shutdown import exit_after_bug, exit_with_code, while_in_contact  # noqa: E402
from train.signals import EXIT_CODE, StopRequest  # noqa: E402

MULTI_RANK_NCCL = (2, 30)  # of which NCCL several ranks may share a GPU
TRACEBACK_SECONDS = 15.0
END_SECONDS = 45.0  # torchrun kills a rank that waits for nccl 30 s after its signal
SKIPPED = 77


class Command(Job):
    """One process of a command of this repository; ended, with its children, on leaving."""

    def __init__(self, cwd: Path, name: str, *arguments: object, **environment: str):
        super().__init__(cwd, ["--name", name])
        self.log.unlink(missing_ok=True)
        with self.log.open("ab") as output:
            self.process = psutil.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=cwd,
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def end(self) -> None:
        family = []
        with suppress(psutil.Error):
            family = self.process.children(recursive=True)
        for process in [self.process, *family]:
            with suppress(psutil.Error):
                process.kill()

    def ended(self) -> bool:
        return self.process.poll() is not None

    def finish(self, code: int = 0) -> str:
        """Wait for the end; return what was printed. Raises AssertionError after another exit code."""
        ended = self.process.wait()
        print(self.printed(), flush=True)
        assert ended == code, f"exit code {ended} for {code}: {self.printed().strip().splitlines()[-1:]}"
        return self.printed()


def need(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise SkippedError(f"{', '.join(missing)} is not installed")


def sample(check: Check) -> Path:
    """Return a folder of drawn images, the same for all lines."""
    folder = check.scratch / "sample"
    make_sample(folder, train_per_class=40 if check.quick else 200, num_test=20 if check.quick else 100)
    return folder


def training_flags(check: Check, name: str) -> list[object]:
    flags: list[object] = ["train/main.py", "--data", sample(check) / "train", "--name", name]
    epochs = 3 if check.quick else 20  # on a GPU of few seconds, so that a signal comes in between
    flags += ["--track", "false", "--device", check.device.type, "--epochs", epochs, "--optimizer", "muon"]
    flags += ["--deterministic", "true", "--snapshot-steps", 1]
    if check.quick:
        return [*flags, "--model", "simple_cnn", "--image-size", 32, "--batch-size", 8]
    return [*flags, "--model", "resnet18", "--batch-size", 32]


def job(check: Check) -> str:
    """Train deterministically; the same stopped by SIGTERM and resumed is bit-equal; export verifies."""
    need("jsonargparse", "onnxscript", "sklearn")
    digests = []
    for name in ("quiet", "stopped"):
        command = [ROOT / "train" / "main.py", *training_flags(check, name)[1:]]
        with Command(check.scratch, name, *command) as run:
            if name == "stopped":
                run.wait_for(1, 2)
                run.process.send_signal(signal.SIGTERM)
                run.finish(EXIT_CODE)
                assert run.place() < (3 if check.quick else 20, 0), "it ended before the signal"
                with Command(check.scratch, name, *command) as resumed:
                    resumed.finish()
            else:
                run.finish()
            digests.append(weights_sha256(run.folder))
    assert digests[0] == digests[1], "the resumed run has other weights"
    export = [ROOT / "export" / "main.py", "--run", check.scratch / "runs" / "quiet"]
    with Command(check.scratch, "export", *export) as exported:
        exported.finish()
    assert (check.scratch / "runs" / "quiet" / "export" / "model.onnx").exists()
    return "resumed after SIGTERM: weights equal bit for bit; exported and verified"


def score(check: Check) -> str:
    """Verify the exported model on the device's provider, and score with it."""
    import onnxruntime

    run = check.scratch / "runs" / "quiet"
    model = run / "export" / "model.onnx"
    if not model.exists():
        raise SkippedError("there is no exported model, see the line job")
    flags: list[object] = []
    if check.device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise SkippedError("onnxruntime has no CUDA provider")
        verify = [ROOT / "export" / "main.py", "--run", run, "--verify-provider", "cuda:fp32"]
        with Command(check.scratch, "verify", *verify) as verified:
            verified.finish()
        flags = ["--provider", "cuda"]
    images, output = sample(check) / "test", check.scratch / "predictions.csv"
    command = [ROOT / "serve" / "main.py", "--model", model, "--images", images, "--output", output, *flags]
    began = time.perf_counter()
    with Command(check.scratch, "score", *command) as scored:
        scored.finish()
    rows = len(output.read_text().splitlines()) - 1
    assert rows == len(list(images.iterdir())), f"{rows} rows"
    return f"{rows} rows in {time.perf_counter() - began:.1f} s, start included"


def torchrun(check: Check, name: str, **environment: str) -> Command:
    """Start two ranks that call the function `name` of this file."""
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, name]
    arguments += ["--device", check.device.type, "--scratch", str(check.scratch)]
    arguments += ["--quick"] if check.quick else []
    return Command(check.scratch, name, *arguments, **environment)


def multi_rank_nccl(check: Check) -> bool:
    return check.device.type == "cuda" and torch.cuda.nccl.version()[:2] >= MULTI_RANK_NCCL


def ranks(check: Check) -> str:
    """Train some steps with two ranks on one device, by gloo and nccl, and compare with one process."""
    one = steps_of(check, Ranks())
    backends = ["gloo", *(["nccl"] if multi_rank_nccl(check) else [])]
    differences = []
    for backend in backends:
        with torchrun(check, "rank", BACKEND=backend, NCCL_MULTI_RANK_GPU_ENABLE="1") as run:
            run.finish()
        two = torch.load(check.scratch / "ranks.pt", weights_only=True)
        difference = max(float((one[name] - two[name]).abs().max()) for name in one)
        differences.append(f"{backend} {difference:.1e}")
        assert difference < 1e-4, f"weights of two ranks by {backend} differ by {difference:.1e} from one's"
    left_out = "" if len(backends) > 1 or check.device.type == "cpu" else "; nccl is older than 2.30"
    return f"largest difference of a weight to one process: {', '.join(differences)}{left_out}"


def rank(check: Check) -> str:
    """One of the two ranks of the line ranks."""
    mine = ranks_from_environment()
    dist.init_process_group(os.environ["BACKEND"], timeout=timedelta(seconds=30))
    weights = steps_of(check, mine)
    if mine.is_main:
        torch.save(weights, check.scratch / "ranks.pt")
    dist.destroy_process_group()
    return "done"


def steps_of(check: Check, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Return the weights after steps of a network without batch norm on this rank's share of a batch."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    state = check.state("lenet5", 64, "sgd", ranks=ranks, warmup_epochs=0.0)
    for number in range(5):
        images, targets = check.batch(16, 64, seed=number)
        mine = slice(ranks.rank, None, ranks.world_size)
        one_step(state, images[mine], targets[mine])
    return {name: value.cpu() for name, value in state.model.state_dict().items()}


def raises(check: Check) -> str:
    """Raise an error on one of two ranks: its traceback must be printed in 15 s, and the job end."""
    by_nccl = multi_rank_nccl(check)
    device = "cuda" if by_nccl else "cpu"
    with torchrun(check, "raising", DEVICE=device, NCCL_MULTI_RANK_GPU_ENABLE="1") as run:
        run.wait_for_text("raises now", 60)
        began = time.monotonic()
        run.wait_until(lambda: "ZeroDivisionError" in run.printed(), "traceback", TRACEBACK_SECONDS)
        seen = time.monotonic() - began
        run.wait_until(run.ended, "end", END_SECONDS)
        run.finish(1)
    return f"traceback after {seen:.1f} s, end after {time.monotonic() - began:.1f} s, {device}"


@exit_after_bug()
def raising(check: Check) -> str:
    """One of the two ranks of the line raises; rank 1 raises."""
    mine, stop = ranks_from_environment(), StopRequest()
    device = torch.device(os.environ["DEVICE"], *([0] if os.environ["DEVICE"] == "cuda" else []))
    with exit_with_code(mine, stop), process_group(mine, device), while_in_contact(mine, stop):
        number = torch.zeros(1, device=device)
        dist.all_reduce(number)
        if mine.rank == 1:
            print("raises now", flush=True)
            print(1 / int(number))
        dist.all_reduce(number)
        number.item()
    return "done"


def absurd(check: Check) -> str:
    """A batch that no memory holds: one line that names --batch-size, exit code 2."""
    need("jsonargparse")
    flags = [*training_flags(check, "absurd")[1:], "--batch-size", 1_000_000, "--image-size", 2048]
    flags += ["--deterministic", "false"]
    with Command(check.scratch, "absurd", ROOT / "train" / "main.py", *flags) as run:
        printed = run.finish(2)
    errors = [line for line in printed.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, errors
    assert "--batch-size" in errors[0]
    return errors[0]


def sync(check: Check) -> str:
    sample(check)
    return gpu_steps.sync(check)


def loader(check: Check) -> str:
    return gpu_steps.loader(check, sample(check) / "train")


def cache(check: Check) -> str:
    return gpu_steps.cache(check, sample(check) / "train")


LINES: dict[str, Callable[[Check], str]] = {
    "versions": gpu_steps.versions,
    "steps": gpu_steps.steps,
    "nan": gpu_steps.nan,
    "sync": sync,
    "job": job,
    "ranks": ranks,
    "raises": raises,
    "absurd": absurd,
    "loader": loader,
    "cache": cache,
    "score": score,
    "table": gpu_steps.table,
}
RANKS = {"rank": rank, "raising": raising}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("line", choices=[*LINES, *RANKS])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--scratch", type=Path, required=True)
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))  # so that children are ended
    args.scratch.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    check = Check(device, args.quick, args.scratch)
    try:
        if device.type == "cuda":
            assert torch.cuda.is_available(), "torch sees no CUDA device"
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        print((LINES | RANKS)[args.line](check), flush=True)
    except SkippedError as error:
        print(f"skipped: {error}")
        return SKIPPED
    except AssertionError as error:
        print(f"FAIL: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Check machine, settings and data before an expensive training: what would fail later, and what is slow.

    python pipelines/doctor.py --data DIR --model resnet50 --weights default --nproc_per_node 4

Takes the flags of train/main.py, and how many processes torchrun is to start on this machine. Nothing is
trained, and no run directory is made. A line for each check: ok, warning (slower, or less is kept) or error
(training or export would fail). serve/doctor.py checks a machine that only scores.

Exit code: 0 nothing stands against the training, 1 something does, 2 unusable flags.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, not pipelines/
    from serve.contract.interrupts import end_on_signal

    end_on_signal(importing=True)

from serve.contract.errors import UserError
from serve.contract.installation import require

require("train", "torch", "timm", "mlflow")

import argparse
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version

import psutil
import torch

from export.convert import Scorer, to_graph
from serve.contract.command_line import Number, command
from serve.contract.images import load_image, load_whole, read_image_file
from serve.contract.urls import is_remote, redact
from serve.doctor import Finding, mlflow_server, onnxruntime_provider, processors, shared_memory, writable
from serve.processors import available_processors, memory_limit
from train.cli import parse_config, read_flags
from train.config import TrainConfig
from train.data.index import exclude, find_images
from train.data.labels import LabelledPaths, describe_counts
from train.data.layouts.part_folders import take_parts
from train.engine.autotune import multiplies_bf16
from train.engine.checks import check_batch_size, check_start
from train.engine.device import check_kernels, driver_version, why_unusable
from train.engine.prepare import DEFAULT_DATA, resolve_defaults, with_name
from train.models.build import build_model
from train.tracking.client import DEFAULT_URI, SQLITE

PACKAGES = ("torch", "torchvision", "timm", "onnx", "mlflow")
MEMORY = 1.5  # GiB: Python with torch, and a small network
FREE = 2.0  # GiB: pixel cache, snapshots and figures of a small run
DECODED = 32  # images that are read and decoded, from all over the data set
SERVER_SECONDS = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code, as in the module's docstring."""
    given = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(given):
        typed, training = command("pipelines/doctor.py"), command("train/main.py")
        text = (__doc__ or "").replace("python pipelines/doctor.py", typed).strip()
        print(f"usage: {typed} [TRAINING FLAGS]\n\n{text}\n\n{training} --help lists the flags.")
        return 0
    try:
        config, processes = read_arguments(given)
    except UserError as error:
        print(f"error: {redact(error)}", file=sys.stderr)
        return 2
    worst = 0
    for finding in diagnose(config, processes):
        print(finding, flush=True)
        worst |= finding.level == "error"
    return int(worst)


def read_arguments(argv: Sequence[str]) -> tuple[TrainConfig, int]:
    """Return the settings, and how many processes are to train; raises UserError for an unusable flag."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--nproc_per_node", "--nproc-per-node", type=Number(int, 1), default=1)
    try:
        own, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    read_flags(rest)
    return parse_config(rest), own.nproc_per_node


def diagnose(config: TrainConfig, processes: int) -> Iterator[Finding]:
    """Yield what each check finds, the quick ones first."""
    yield Finding("ok", "versions", describe_versions())
    yield from check_devices(config, processes)
    yield processors(1, processes)  # training divides the processors among its processes itself
    yield check_memory()
    yield shared_memory(0)
    yield writable(config.output, FREE)
    yield check_mlflow(config)
    yield onnxruntime_provider("auto", "fp32", None)
    yield attempt("batch", lambda: describe_batch(config, processes))
    yield (settings := attempt("settings", lambda: describe_settings(config)))
    yield from check_data(config)
    if settings.level == "ok":
        yield attempt("export", lambda: describe_export(config))


def attempt(about: str, check: Callable[[], str]) -> Finding:
    """Return the text that a check returns as ok, or its UserError as error."""
    try:
        return Finding("ok", about, check())
    except UserError as error:
        return Finding("error", about, str(error))


def describe_versions() -> str:
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
    )


def check_devices(config: TrainConfig, processes: int) -> Iterator[Finding]:
    """Check that torch has a GPU for each process and can compute on it, or say that it trains without."""
    built = (
        f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is without CUDA"
    )
    if config.device == "cpu" or not torch.cuda.is_available():
        reason = why_unusable() if config.device != "cpu" else ""
        if reason or config.device == "cuda":
            yield Finding("error", "device", reason or f"--device cuda, but torch sees no GPU ({built})")
            return
        fast = "bf16 in hardware" if multiplies_bf16(torch.device("cpu")) else "no bf16 in hardware"
        why = "as --device cpu says" if config.device == "cpu" else f"no NVIDIA driver ({built})"
        yield Finding("ok", "device", f"{available_processors()} processors, {fast}; {why}")
        return
    count = torch.cuda.device_count()
    yield Finding("ok", "driver", f"NVIDIA {driver_version()}, {built}, {count} GPUs visible")
    if processes != count:
        wanted = f"torchrun --nproc_per_node={count}"
        text = f"{processes} processes for {count} GPUs: start one for each, {wanted}"
        yield Finding("error" if processes > count > 1 else "warning", "processes", text)
    for number in range(count):
        yield attempt(f"GPU {number}", partial(check_gpu, torch.device("cuda", number)))


def check_gpu(device: torch.device) -> str:
    """Return what a GPU is, after a product in each arithmetic; UserError when it cannot compute."""
    check_kernels(device)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        for dtype in (torch.float32, torch.float16, *((torch.bfloat16,) if bf16 else ())):
            ones = torch.ones(64, 64, device=device, dtype=dtype)
            if float((ones @ ones).float().sum()) != 64**3:
                raise UserError(f"{dtype} products are wrong: the GPU is broken")
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        raise UserError(f"cannot compute: {error}") from error
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return (
        f"{name}, compute capability {major}.{minor}, {'bf16' if bf16 else 'no bf16'}, "
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    )


def check_memory(root: Path = Path("/")) -> Finding:
    """Warn of less memory than a small training takes; a container's limit counts, not its machine's."""
    found = psutil.virtual_memory()
    total = min(found.total, memory_limit(root) or found.total)
    free = min(found.available, total)
    text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    text += " (control group's limit)" if total < found.total else ""
    if free < MEMORY * 2**30:
        return Finding("warning", "memory", f"{text}: a small training takes {MEMORY:g}")
    return Finding("ok", "memory", text)


def check_mlflow(config: TrainConfig) -> Finding:
    """Check that MLflow answers, or that its database can be written."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    if not config.track:
        return Finding("ok", "MLflow", "off, as --track false says")
    if found := SQLITE.fullmatch(uri):
        file = Path(found[2])
        finding = writable(file.absolute().parent, 0.1)
        state = "is there" if file.is_file() else "will be made"
        return Finding(finding.level, f"MLflow {uri}", f"{file.absolute()} {state}: {finding.message}")
    opted_in = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
    if not opted_in and ("://" not in uri or uri.startswith("file:")) and not uri.startswith("databricks"):
        text = f"MLflow takes no folder any more: set MLFLOW_TRACKING_URI={DEFAULT_URI}"
        return Finding("warning", f"MLflow {uri}", text)
    return mlflow_server(uri, time.monotonic() + SERVER_SECONDS)


def describe_batch(config: TrainConfig, processes: int) -> str:
    check_batch_size(config, processes)
    each = config.batch_size // processes // config.accumulation
    steps = f", {config.accumulation} accumulation steps" if config.accumulation > 1 else ""
    return f"{config.batch_size} images a step, {each} on each of {processes} processes{steps}"


def describe_settings(config: TrainConfig) -> str:
    """Return the network and its run, after it was built without memory; raises UserError."""
    complete, _ = resolve_defaults(config)
    complete = with_name(complete)
    check_start(complete)
    with torch.device("meta"):
        model, _ = build_model(complete.model, 2, complete.image_size)
    parameters = sum(tensor.numel() for tensor in model.parameters())
    return f"{complete.model} with {parameters:,} parameters takes {complete.image_size} pixels"


def describe_export(config: TrainConfig) -> str:
    """Return how long torch's exporter takes for the network, with random weights and two classes; raises
    UserError where it cannot trace it."""
    complete, _ = resolve_defaults(config)
    model, _ = build_model(complete.model, 2, complete.image_size)
    began = time.monotonic()
    to_graph(Scorer(model, complete.clip_probabilities), complete.preprocess().size)
    return f"{complete.model} becomes an ONNX graph in {time.monotonic() - began:.0f} s"


def check_data(config: TrainConfig) -> Iterator[Finding]:
    """Check labels, and a few images, of training and validation data; a URL is left to training."""
    if not config.data and not DEFAULT_DATA.exists():
        yield Finding("ok", "data", "no --data: training would draw the sample set")
        return
    config = config.replace(data=config.data or str(DEFAULT_DATA))
    if is_remote(config.data) or is_remote(config.val_data):
        yield Finding("ok", "data", "remote, not tried: training copies it first")
        return
    notes: list[str] = []
    try:
        config, _ = take_parts(config)
        found, held_out = find_images(config, notes)
        if config.exclude:
            found = exclude(found, config.exclude, config.data, notes)
    except UserError as error:
        yield Finding("error", f"--data {config.data}", str(error))
        return
    yield check_images(f"--data {config.data}", found, config)
    if held_out:
        yield check_images(f"--val-data {config.val_data or config.data}", held_out, config)
    for note in notes:
        if note.startswith("warning: "):
            yield Finding("warning", "labels", note.removeprefix("warning: "))


def check_images(about: str, found: LabelledPaths, config: TrainConfig) -> Finding:
    """Decode images from all over a data set."""
    paths = list(found.labels)
    bad, began, tried = [], time.monotonic(), paths[:: max(1, len(paths) // DECODED)][:DECODED]
    for path in tried:
        try:
            load_image(read_image_file(found.root / path), load_whole, max_megapixels=config.max_megapixels)
        except (OSError, ValueError) as error:
            bad.append(f"{path}: {error}")
    speed = f"{1000 * (time.monotonic() - began) / len(tried):.0f} ms an image"
    counts = describe_counts(Counter(found.labels.values()))
    text = f"{len(paths)} images: {counts}; {speed} to read and decode"
    if bad:
        too_many = len(bad) > max(1, config.max_bad * len(tried))
        text = f"{len(bad)} of {len(tried)} images cannot be read ({bad[0]}): {text}"
        return Finding("error" if too_many else "warning", about, text)
    return Finding("ok", about, text)


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())

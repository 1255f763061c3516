"""Lines of benchmarks/gpu_check.py that call training steps in their own process."""

import os
import platform
import statistics
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from train.config import TrainConfig
from train.data.loader import Batch
from train.data.sampler import EpochPlan, Key
from train.distributed import Ranks
from train.engine.build import build_run
from train.engine.device import choose_workers
from train.engine.launch import LaunchTimes, time_launch
from train.engine.loaders import build_loaders
from train.engine.loop import EpochProgress, accumulate_gradients, train_batches, train_one_epoch
from train.engine.loss import Criterion
from train.engine.prepare import prepare
from train.engine.run import TrainingRun
from train.engine.state import TrainState, build_state
from train.models.build import build_model
from train.optim.optimizers import OPTIMIZERS, resolve_optimizer
from train.precision import Precision

# largest relative differences (L2) of gradients and of the step to those of float32 on a CPU
GRADIENT = {"": 1e-3, "bfloat16": 0.5, "float16": 0.15}
STEP = {"": 0.05, "bfloat16": 0.8, "float16": 0.4}  # Adam's first step is the gradient's sign
DEVICE_CACHE_SHARE = 0.95  # of the speed of the same loop with its images on the device
TABLE_SECONDS = 40.0  # after which no further row is begun
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "jsonargparse",
    "mlflow",
)


class SkippedError(Exception):
    """The line has no meaning on this machine."""


@dataclass(frozen=True)
class Check:
    device: torch.device
    quick: bool
    scratch: Path

    @property
    def autocasts(self) -> list[str]:
        return ["", "bfloat16", *(["float16"] if self.device.type == "cuda" else [])]

    def state(
        self,
        name: str,
        size: int,
        optimizer: str,
        autocast: str = "",
        device: torch.device | None = None,
        ranks: Ranks | None = None,
        **changes: Any,
    ) -> TrainState:
        """Return a network of ten classes from the same random weights each time, before its first step."""
        torch.manual_seed(0)
        model = build_model(name, 10, size)[0].to(device or self.device)
        config = TrainConfig(model=name, image_size=size, optimizer=optimizer, **{"ema": 0, **changes})  # type: ignore[arg-type]
        precision = Precision(autocast, channels_last=not name.startswith("vit"))
        state = build_state(
            resolve_optimizer(config), model, 100, precision, ranks or Ranks(), device or self.device
        )
        state.begin_epoch(0, config)
        return state

    def batch(self, n: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return noise around a colour of each class, and targets, on the device."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randint(0, 256, (n, size, size, 3), generator=generator)
        colours = torch.randint(0, 256, (10, 1, 1, 3), generator=torch.Generator().manual_seed(0))
        labels = torch.arange(n) % 10
        images = ((noise + colours[labels]) // 2).byte()
        targets = torch.nn.functional.one_hot(labels, 10).float()
        return images.to(self.device), targets.to(self.device)


def backward(state: TrainState, images: Tensor, targets: Tensor) -> Tensor:
    state.batch_norm.save()
    loss = Criterion(0.0)(state.forward(images), targets).mean()
    state.backward(loss)
    return loss.detach()


def one_step(state: TrainState, images: Tensor, targets: Tensor) -> None:
    backward(state, images, targets)
    state.update(1.0)


def versions(check: Check) -> str:
    print(f"python {platform.python_version()}, {os.cpu_count()} processors")
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            print(package, version(package))
    if check.device.type == "cpu":
        return f"torch {torch.__version__} on the CPU"
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    gpu = torch.cuda.get_device_properties(check.device)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    print(f"cuDNN {torch.backends.cudnn.version()}, {', '.join(torch.cuda.get_arch_list())}")
    return (
        f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}, driver {driver}, "
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}"
    )


def steps(check: Check) -> str:
    """Compare one step of each optimizer and precision with float32 on the CPU, in double the digits."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    size, images = 64, 32
    cpu = replace(check, device=torch.device("cpu"))
    failed = []
    for optimizer in OPTIMIZERS:
        reference = gradients_and_step(cpu, optimizer, "", size, images)
        for autocast in check.autocasts:
            found = gradients_and_step(check, optimizer, autocast, size, images)
            gradient, step = (relative(a, b) for a, b in zip(found, reference, strict=True))
            passed = gradient <= GRADIENT[autocast] and step <= STEP[autocast]
            name = f"{optimizer} {autocast or 'float32'}"
            print(f"{name}: gradients differ by {gradient:.1e}, the step by {step:.1e}", flush=True)
            failed += [] if passed else [name]
    assert not failed, f"too far from float32 on the CPU: {', '.join(failed)}"
    return f"{len(OPTIMIZERS)} optimizers in {len(check.autocasts)} precisions are near float32 on the CPU"


def gradients_and_step(
    check: Check, optimizer: str, autocast: str, size: int, n: int
) -> tuple[Tensor, Tensor]:
    """Return all gradients and all changes of weights, each as one float64 vector on the CPU."""
    # after the warm-up's first step, whose rate is 0 for some schedules
    state = check.state("resnet18", size, optimizer, autocast, warmup_epochs=0.0)
    before = [p.detach().clone() for p in state.model.parameters()]
    backward(state, *check.batch(n, size))
    scale = state.scaler.get_scale() if state.scaler.is_enabled() else 1.0
    gradients = [p.grad / scale for p in state.model.parameters() if p.grad is not None]
    vector = torch.cat([g.double().flatten().cpu() for g in gradients])
    assert state.update(0.0), "the gradients are not finite"
    changes = [
        (p.detach() - b).double().flatten().cpu()
        for p, b in zip(state.model.parameters(), before, strict=True)
    ]
    return vector, torch.cat(changes)


def relative(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def nan(check: Check) -> str:
    """A step with NaN in one gradient changes no weight, moment or statistic by a bit."""
    size, images = (32, 8) if check.quick else (64, 32)
    changed = []
    for optimizer in OPTIMIZERS:
        for autocast in check.autocasts:
            state = check.state("resnet18", size, optimizer, autocast)
            for seed in range(2):
                one_step(state, *check.batch(images, size, seed))
            before = tensors_of(state)
            backward(state, *check.batch(images, size, 2))
            gradient = next(p.grad for p in state.model.parameters() if p.grad is not None)
            gradient[(0,) * gradient.ndim] = float("nan")
            finite = bool(state.update(1.0))
            after = tensors_of(state)
            names = [name for name in before if not torch.equal(before[name], after[name])]
            if finite or names or before.keys() != after.keys():
                changed.append(f"{optimizer} {autocast or 'float32'}: {names[:3]}")
    assert not changed, "; ".join(changed)
    return "weights, moments and batch-norm statistics stay bit-equal"


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """Return copies of weights, buffers and the optimizer's state."""
    found = {name: value.clone() for name, value in state.model.state_dict().items()}
    for number, moments in state.optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            if isinstance(value, Tensor):
                found[f"{number}.{name}"] = value.clone()
    return found


def sync(check: Check) -> str:
    """Count where 20 steps of real training wait for the device."""
    if check.device.type == "cpu":
        raise SkippedError("a CPU is not waited for")
    options: dict[str, dict[str, Any]] = {name: {"optimizer": name} for name in OPTIMIZERS}
    options["adamw fp16"] = {"optimizer": "adamw", "precision": "fp16"}
    options["muon, mixup, cutmix"] = {"optimizer": "muon", "mixup": 0.2, "cutmix": 1.0}
    options["adamw, subject crop"] = {"optimizer": "adamw", "subject_crop": "cam", "subject_start": 0.0}
    options["adamw, device cache"] = {"optimizer": "adamw", "pixel_cache": "device"}
    waits: dict[str, Counter[str]] = {}
    for name, changes in options.items():
        run = make_run(check, check.scratch / "sample" / "train", batch_size=8, model="resnet18", **changes)
        run.state.begin_epoch(0, run.stage)
        batches, progress = train_batches(run, 0), EpochProgress(run.ranks, run.device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(23):
                torch.cuda.set_sync_debug_mode("warn" if step >= 3 else "default")
                sums = accumulate_gradients(run, batches, step)
                progress.count(sums, run.state.update(1.0), 8)
            torch.cuda.set_sync_debug_mode("default")
        places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
        waits[name] = Counter(places)
        print(f"{name}: {sum(waits[name].values())} waits in 20 steps {dict(waits[name])}", flush=True)
    waiting = [name for name, places in waits.items() if places]
    assert not waiting, f"waits for the device: {', '.join(waiting)}"
    return f"0 waits in 20 steps: {'; '.join(waits)}"


def make_run(check: Check, data: Path, **changes: Any) -> TrainingRun:
    """Return a run on the drawn images as train/main.py builds it, with bf16 on a GPU."""
    if not data.exists():
        raise SkippedError("there are no images yet: run the line loader or job before")
    precision = "bf16" if check.device.type == "cuda" else "fp32"
    settings = {"precision": precision, "channels_last": True, "track": False, "epochs": 2} | changes
    device = check.device.type
    config = TrainConfig(data=str(data), output=str(check.scratch / "runs"), device=device, **settings)
    config, found = prepare(config)
    workers = choose_workers(config, Ranks(), check.device)
    return build_run(config, found, None, Ranks(), check.device, workers, print)


def loader(check: Check, data: Path) -> str:
    """Measure the loader alone, from the file of decoded images and from the device's memory."""
    size, batch_size = (32, 16) if check.quick else (224, 256)
    speeds = []
    for mode in ("on", "device"):
        run = make_run(check, data, model="simple_cnn", image_size=size, batch_size=16, pixel_cache=mode)
        repeated = replace(run.data, train=run.data.train.take(many(len(run.data.train), 20 * batch_size)))
        workers = choose_workers(run.config, Ranks(), check.device)
        loaders = build_loaders(run.config, run.stage, repeated, Ranks(), check.device, workers, print)
        plan = EpochPlan(len(repeated.train), batch_size, 0)
        for epoch in range(2):  # the first starts the processes
            began = time.perf_counter()
            for batch in loaders[0](plan.batches(epoch)):
                batch.to(check.device)
            if check.device.type == "cuda":
                torch.cuda.synchronize()
            speed = len(repeated.train) / (time.perf_counter() - began)
        speeds.append(f"{mode} {speed:,.0f}")
    return f"images/s of {size} px alone, --pixel-cache {', '.join(speeds)}"


def many(n: int, wanted: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return [wanted] indices that run round range(n)."""
    return np.arange(wanted) % n


class Resident:
    """A loader that yields one batch, which is on the device already, again and again."""

    def __init__(self, batch: Batch):
        self.batch, self.lost, self.waited = batch, dict[str, str](), 0.0

    def __call__(self, batches: Iterable[list[Key]]) -> Iterator[Batch]:
        for _ in batches:
            yield self.batch


def cache(check: Check, data: Path) -> str:
    """Train ResNet-50 at 224 px in bf16 from the device's cache, and the same with the images given."""
    size, batch_size, name, steps = (32, 16, "simple_cnn", 5) if check.quick else (224, 256, "resnet50", 20)
    run = make_run(
        check,
        data,
        model=name,
        image_size=size,
        batch_size=batch_size,
        optimizer="adamw",
        pixel_cache="device",
    )
    many_images = run.data.train.take(many(len(run.data.train), steps * batch_size))
    run.data = replace(run.data, train=many_images)
    run.train_loader, _ = build_loaders(run.config, run.stage, run.data, Ranks(), check.device, 0, print)
    run.plan = EpochPlan(len(many_images), batch_size, 0)
    cached = run.train_loader
    first = next(iter(cached(run.plan.batches(0))))
    resident: Any = Resident(first)  # its images are there, and augmentation hashes the numbers on the CPU
    speeds: dict[str, list[float]] = {"device cache": [], "given": []}
    for _ in range(4):
        for kind, loaded in (("device cache", cached), ("given", resident)):
            run.train_loader = loaded
            metrics = train_one_epoch(run, EpochProgress(run.ranks, run.device))
            speeds[kind].append(metrics["images_per_second"])
    medians = {kind: statistics.median(values[1:]) for kind, values in speeds.items()}
    share = medians["device cache"] / medians["given"]
    listed = ", ".join(f"{kind} {speed:,.0f}" for kind, speed in medians.items())
    result = f"{name} at {size} px, images/s: {listed}; share {share:.3f}"
    assert share >= DEVICE_CACHE_SHARE or check.device.type == "cpu", result
    return result


def table(check: Check) -> str:
    """Print times, launches and memory of a step for networks and optimizers, eager and compiled."""
    networks = [("resnet18", 128, 32), ("resnet18", 128, 128), ("resnet50", 224, 128)]
    networks += [("vit_small_patch16_224", 224, 128)]
    if check.quick:
        networks = [("simple_cnn", 32, 8), ("lenet5", 32, 8)]
    print("| network | px | batch | optimizer | | device ms | host ms | launches | GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows, left_out, began = 0, 0, time.monotonic()
    for compiled in (False, True):
        for name, size, n in networks:
            for optimizer in ("adamw", "muon"):
                if time.monotonic() - began > TABLE_SECONDS:
                    left_out += 1
                    continue
                print(row(check, name, size, n, optimizer, compiled), flush=True)
                rows += 1
    return f"{rows} rows" + (f", {left_out} left out for lack of time" if left_out else "")


def row(check: Check, name: str, size: int, n: int, optimizer: str, compiled: bool) -> str:
    cuda = check.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    state = check.state(name, size, optimizer, "bfloat16" if cuda else "", compile=compiled)
    images, targets = check.batch(n, size)
    for _ in range(3):
        one_step(state, images, targets)
    if cuda:
        turns = [time_launch(lambda: one_step(state, images, targets), check.device) for _ in range(5)]
        times = LaunchTimes(
            *(statistics.median(t) for t in zip(*((t.host, t.device) for t in turns), strict=True))
        )
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            one_step(state, images, targets)
            torch.cuda.synchronize()
        launches = sum(e.count for e in recorded.key_averages() if "LaunchKernel" in e.key)
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
    else:
        started = time.perf_counter()
        one_step(state, images, targets)
        times, launches, memory = LaunchTimes(time.perf_counter() - started, float("nan")), 0, ""
    torch._dynamo.reset()
    columns = [name, size, n, optimizer, "compiled" if compiled else "eager"]
    columns += [f"{1000 * times.device:.1f}", f"{1000 * times.host:.1f}", launches, memory]
    return f"| {' | '.join(map(str, columns))} |"

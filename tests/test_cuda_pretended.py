"""Training steps on a pretended GPU: every tensor is where it belongs, and no step waits for the device.

Tensors of cuda:0 have shapes but no numbers, and no driver is needed. The backward pass alone is left out:
autograd has no threads for such a device.
"""

import itertools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from detectors import detector
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from train_data import ONE, build, make_data, make_run, pixel_dataset

from train.config import TrainConfig
from train.data.augment import ImageAugment
from train.data.device_cache import DeviceLoader
from train.data.index import ImageSet
from train.data.loader import Batch
from train.engine.loop import EpochProgress, train_one_epoch
from train.engine.loss import Criterion
from train.engine.state import TrainState, build_state
from train.models.subject_crop.build import add_subject_crop
from train.optim.optimizers import OPTIMIZERS
from train.precision import Precision

CUDA = torch.device("cuda", 0)
BY_DESIGN = {"check_divergence", "epoch_metrics"}  # every 50 steps, and at an epoch's end
aten: Any = torch.ops.aten

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


class Line(NamedTuple):
    """Where in this project an operation was called."""

    file: Path
    number: int | None
    function: str


class Audit(TorchDispatchMode):
    """Counts where the host would wait for the device: for numbers that it reads, and for copies that are
    not `non_blocking`. Fused kernels must get tensors whose memory they can walk through together."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[Line] = Counter()
        self.dtypes: set[torch.dtype] = set()
        """Of what is convolved."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op is aten._local_scalar_dense.default and on_cuda(args[0]):
            self.waits[innermost_line()] += 1
            return 1.0 if args[0].is_floating_point() else 0
        if op in (aten._fused_adamw_.default, aten._fused_sgd_.default):
            check_layouts(args)
        if op is aten._fused_sgd_.default:
            return None  # it has no pretended kernel
        if op is aten.convolution.default:
            self.dtypes.add(args[0].dtype)
        result = op(*args, **kwargs)
        if op in (aten._to_copy.default, aten.copy_.default):
            crosses = on_cuda(result) != on_cuda(args[1 if op is aten.copy_.default else 0])
            if crosses and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                self.waits[innermost_line()] += 1
        return result

    def functions(self) -> set[str]:
        return {line.function for line in self.waits}


def on_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def check_layouts(lists: Any) -> None:
    """As torch's kernels demand: same device, and same strides where there is more than one number."""
    for tensors in zip(*(part for part in lists if isinstance(part, list | tuple) and part), strict=True):
        assert all(map(on_cuda, tensors))
        layouts = {
            tuple((n, stride) for n, stride in zip(t.shape, t.stride(), strict=True) if n > 1)
            for t in tensors
            if t.shape == tensors[0].shape or t.ndim  # not AdamW's counters
        }
        assert len(layouts) == 1, layouts


def innermost_line() -> Line:
    frames = traceback.extract_stack()[:-2]  # without the audit's own
    lines = [Line(Path(frame.filename), frame.lineno, frame.name) for frame in frames]
    folders = [REPOSITORY / name for name in ("train", "serve", "tests")]  # .venv may be beside them
    return [line for line in lines if any(map(line.file.is_relative_to, folders))][-1]


@contextmanager
def pretended_cuda() -> Iterator[Audit]:
    def backward(state: TrainState, loss: Tensor) -> None:
        state.scaler.scale(loss)
        for parameter in state.model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    with ExitStack() as stack:
        for target, value in (
            ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            ("torch.cuda.is_bf16_supported", lambda: True),
            ("torch.nn.Module.to", lambda module, **layout: module),  # fails on pretended tensors
        ):
            stack.enter_context(patch(target, value))
        stack.enter_context(patch.object(TrainState, "backward", backward))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Audit())


def move(root: nn.Module) -> None:
    """Put a module's tensors onto the pretended device, in their layout."""
    for module in root.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = torch.empty_strided(
                        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA
                    )
                    if isinstance(tensor, nn.Parameter):
                        moved = nn.Parameter(moved, tensor.requires_grad)
                    tensors[name] = moved


@dataclass
class Batches:
    """Loader of one batch, again and again."""

    batch: Batch
    waited = 0.0

    def __call__(self, keys: object) -> Iterator[Batch]:
        return itertools.repeat(self.batch)


def images_on_device(images: ImageSet, config: TrainConfig) -> DeviceLoader:
    """Loader of images of 40 x 50 pixels that are in the device's memory."""
    sizes = np.array([[50, 40]] * len(images))
    cache: Any = MagicMock(offsets=np.arange(len(images)) * 50 * 40 * 3, sizes=sizes)
    cache.__len__.return_value = len(images)
    pixels = torch.empty(len(images) * 50 * 40, 3, dtype=torch.uint8, device=CUDA)
    return DeviceLoader(pixel_dataset(images, config, ImageAugment(config), cache), CUDA, pixels)


def train_pretended(
    tmp_path: Path,
    precision: Precision,
    criterion: Callable[[Criterion], nn.Module] = lambda criterion: criterion,
    name: str = "simple_cnn",
    teacher: bool = False,
    soft_targets: bool = False,
    in_memory: bool = False,
    **settings: Any,
) -> Audit:
    """Train an epoch of two steps as `train_one_epoch` does."""
    config, data = make_data(tmp_path, image_size=32, val_fraction=0.5, **settings)
    model = build(name, 2, 32)
    add_subject_crop(model, config.to_dict(), config.preprocess().size)
    model.freeze(config.freeze) if config.freeze else None
    weights = [0.5, 1.5] if config.class_weights == "balanced" else None
    loss = Criterion(config.label_smoothing, weights, 0.5 if teacher else 0.0)
    run = make_run(config, data, model, criterion=loss)
    n, side = run.plan.micro_batch_size, config.input_size(32)
    batch = Batch(
        torch.zeros(n, side, side, 3, dtype=torch.uint8),
        torch.zeros(n, dtype=torch.long),
        torch.ones(n),
        torch.arange(n),
    )
    run.train_loader = Batches(batch)  # type: ignore[assignment]
    run.device = CUDA
    teachers = [build("simple_cnn", 2, 32).eval()] if teacher else []
    model.to(memory_format=precision.memory_format)
    with pretended_cuda() as audit:
        for module in (model, loss, *teachers):
            move(module)
        run.teacher = teachers[0] if teachers else None
        run.soft_targets = torch.zeros(len(data.train), 2, device=CUDA) if soft_targets else None
        run.criterion = criterion(loss)  # type: ignore[assignment]
        run.state = build_state(config, model, run.plan.steps, precision, ONE, CUDA)
        if in_memory:
            run.train_loader = images_on_device(data.train, config)
        audit.waits.clear()
        train_one_epoch(run, EpochProgress(ONE, CUDA))
    return audit


@pytest.mark.parametrize("autocast", ["", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_step_waits_for_the_device(tmp_path: Path, optimizer: str, autocast: str) -> None:
    for clip_grad in (1.0, 0.0):  # fp16 divides gradients before they are clipped, or in the optimizer
        precision = Precision(autocast)
        audit = train_pretended(tmp_path, precision, optimizer=optimizer, clip_grad=clip_grad)
        assert audit.functions() == BY_DESIGN, audit.waits
        assert audit.dtypes == {precision.dtype}


CAM = {"subject_crop": "cam", "subject_start": 0.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "mixing": {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1},
    "colours": {"color_jitter": 0.3, "random_erasing": 0.9},
    "images in the device's memory": {"in_memory": True, "crop_scale": 0.3, "flip": 0.5},
    "TrivialAugment": {"trivial_augment": True, "random_erasing": 0.9},
    "accumulation": {"accumulation": 2, "ema": 0.0},
    "a frozen network": {"freeze": 2, "layer_decay": 0.5},
    "a teacher": {"teacher": "run", "soft_targets": True, "class_weights": "balanced"},
    "contiguous": {"channels_last": False},
    "a transformer": {"name": "vit_tiny_patch16_224", "drop_path": 0.1},
    "subject crop": CAM,
    "subject crop without average": CAM | {"subject_average": False, "name": "resnet18"},
    "a detector": {"subject_crop": "detector", "ema": 0.0},  # whose anchors pretended tensors cannot copy
    "a detector's classes": {"subject_crop": "detector", "crop_classes": "1,2", "ema": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_option_makes_a_step_wait(tmp_path: Path, options: dict[str, Any]) -> None:
    if options.get("subject_crop") == "detector":
        torch.save(detector().state_dict(), tmp_path / "detector.pt")
        options = options | {"crop_detector": str(tmp_path / "detector.pt")}
    options = options | {"teacher": True} if "teacher" in options else options
    precision = Precision("bfloat16", options.get("channels_last", True))
    audit = train_pretended(tmp_path, precision, optimizer="muon", **options)
    assert audit.functions() == BY_DESIGN, audit.waits


class Planted(nn.Module):
    """A criterion with a fault."""

    def __init__(self, criterion: Criterion, fault: Callable[[Tensor], object]):
        super().__init__()
        self.criterion, self.fault = criterion, fault

    def forward(self, *arguments: Any) -> Tensor:
        loss: Tensor = self.criterion(*arguments)
        self.fault(loss)
        return loss


@pytest.mark.parametrize(
    "fault",
    [
        lambda loss: loss.sum().item(),
        lambda loss: loss.sum().cpu(),
        lambda loss: torch.ones(4).to(loss.device),
        lambda loss: loss.new_tensor([1.0]),
    ],
    ids=["item", "copy to the host", "copy to the device", "made on the host"],
)
def test_the_audit_finds_the_line_that_waits(tmp_path: Path, fault: Any) -> None:
    audit = train_pretended(tmp_path, Precision(), lambda criterion: Planted(criterion, fault))
    (line,) = [line for line in audit.waits if line.function not in BY_DESIGN]
    assert line[:2] == (Path(__file__), fault.__code__.co_firstlineno)
    assert audit.waits[line] == 2


def test_the_audit_finds_a_tensor_on_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cpu"):
        train_pretended(
            tmp_path, Precision(), lambda loss: Planted(loss, lambda values: values + torch.ones(4))
        )


def test_the_audit_finds_tensors_of_another_layout_in_a_fused_kernel() -> None:
    with pretended_cuda():
        weight = nn.Parameter(torch.empty(4, 3, 5, 5, device=CUDA))
        weight.grad = torch.empty_like(weight, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW([weight], fused=True)
        with pytest.raises(AssertionError):
            optimizer.step()

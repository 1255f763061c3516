"""The loops that benchmarks/train.py compares; each trains on a folder and prints one JSON line.

    python benchmarks/training_loops.py tutorial --data DIR --model resnet18 --image-size 128

Some batches first, untimed, then one epoch with everything that belongs to it: reading, decoding,
augmentation, steps, the loss that is looked at.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train.models.zoo import create  # noqa: E402

WARM_UP = 5  # batches
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Step = Callable[[torch.Tensor, torch.Tensor], float]


class Files(Dataset[tuple[Any, int]]):
    """label.number.jpg, as the tutorial reads them."""

    def __init__(self, folder: Path, transform: Any = None):
        self.paths = sorted(folder.iterdir())
        names = sorted({path.name.partition(".")[0] for path in self.paths})
        self.labels = [names.index(path.name.partition(".")[0]) for path in self.paths]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.open(self.paths[index]).convert("RGB")
        return (self.transform(image) if self.transform else image), self.labels[index]


def tutorial(args: argparse.Namespace) -> tuple[Iterable[Any], Step]:
    """Adam, float32, images resized and nothing else, loaded in the training process; the loss and the
    accuracy are read after every step."""
    size = (args.image_size, args.image_size)
    transform = transforms.Compose([transforms.Resize(size), transforms.ToTensor()])
    loader = DataLoader(Files(args.data, transform), args.batch_size, shuffle=True)
    network = create(args.model, 2, args.image_size).train()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)

    def step(images: torch.Tensor, labels: torch.Tensor) -> float:
        output = network(images)
        loss = F.cross_entropy(output, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = (output.argmax(1) == labels).float().mean().item()
        return loss.item() + accuracy

    return loader, step


def references(args: argparse.Namespace) -> tuple[Iterable[Any], Step]:
    """As torchvision's reference script: SGD, random resized crop, flips, loader processes, float32 (its
    mixed precision is for CUDA), label smoothing, the loss read for its meters."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(args.image_size),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(MEAN, STD),
        ]
    )
    workers = len(os.sched_getaffinity(0))
    loader = DataLoader(Files(args.data, transform), args.batch_size, shuffle=True, num_workers=workers)
    network = create(args.model, 2, args.image_size).train()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    def step(images: torch.Tensor, labels: torch.Tensor) -> float:
        loss = criterion(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value: float = loss.item()
        return value

    return loader, step


def timm_like(args: argparse.Namespace, amp: bool = False) -> tuple[Iterable[Any], Step]:
    """As timm's training script with --channels-last: its loader and SGD."""
    from timm.data import create_loader
    from timm.optim import create_optimizer_v2

    loader = create_loader(
        Files(args.data),
        input_size=(3, args.image_size, args.image_size),
        batch_size=args.batch_size,
        is_training=True,
        use_prefetcher=False,
        num_workers=len(os.sched_getaffinity(0)),
        color_jitter=0.4,
        auto_augment=None,
        device=torch.device("cpu"),
    )
    network = create(args.model, 2, args.image_size).train().to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(network, opt="sgd", lr=0.05, weight_decay=2e-5, momentum=0.9)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(images: torch.Tensor, labels: torch.Tensor) -> float:
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = criterion(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return 0.0

    return loader, step


LOOPS: dict[str, Callable[[argparse.Namespace], tuple[Iterable[Any], Step]]] = {
    "tutorial": tutorial,
    "references": references,
    "timm_like": timm_like,
    "timm_like_bf16": partial(timm_like, amp=True),  # --amp --amp-dtype bfloat16
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()

    torch.manual_seed(0)
    loader, step = LOOPS[args.loop](args)
    for number, (images, labels) in enumerate(loader):
        step(images, labels)
        if number + 1 == WARM_UP:
            break
    started, seen = time.perf_counter(), 0
    for images, labels in loader:
        step(images, labels)
        seen += len(images)
    print(json.dumps({"images": seen, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()

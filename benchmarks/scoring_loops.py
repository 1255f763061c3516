"""The loops that benchmarks/serve.py compares; each scores a list of images once and prints one JSON line.

    python benchmarks/scoring_loops.py plain --model FOLDER/resnet18 --images DIR --limit 500

What is imported and opened before the first image is not timed; a few images are scored first.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZE, RESIZE = 224, 256
WARM_UP = 8
Scorer = Callable[[list[str]], int]
"""Scores the files of these names; how many rows that gave."""


def load_network(model: Path) -> Any:
    import torch

    return torch.load(model.with_suffix(".pt"), weights_only=False).eval()  # written by benchmarks/serve.py


def usual_transform() -> Any:
    from torchvision import transforms

    steps = [transforms.Resize(RESIZE), transforms.CenterCrop(SIZE), transforms.ToTensor()]
    return transforms.Compose([*steps, transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


def plain(model: Path) -> Scorer:
    """PyTorch as a tutorial shows it: open, transform, stack 32, run."""
    import torch
    from PIL import Image

    network, transform = load_network(model), usual_transform()

    @torch.inference_mode()
    def score(paths: list[str]) -> int:
        rows = 0
        for first in range(0, len(paths), 32):
            batch = torch.stack(
                [transform(Image.open(p).convert("RGB")) for p in paths[first : first + 32]]
            )
            rows += len(network(batch).softmax(1).tolist())
        return rows

    return score


def dataloader(model: Path) -> Scorer:
    """The same with a DataLoader of a worker a processor and batches of 64."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    network, transform = load_network(model), usual_transform()

    class Files(Dataset[torch.Tensor]):
        def __init__(self, paths: list[str]):
            self.paths = paths

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> torch.Tensor:
            tensor: torch.Tensor = transform(Image.open(self.paths[index]).convert("RGB"))
            return tensor

    @torch.inference_mode()
    def score(paths: list[str]) -> int:
        loader = DataLoader(Files(paths), 64, num_workers=len(os.sched_getaffinity(0)))
        return sum(len(network(batch).softmax(1).tolist()) for batch in loader)

    return score


def timm_like(model: Path) -> Scorer:
    """timm's loader with the defaults of its inference script: batches of 256, two workers."""
    import torch
    from timm.data import ImageDataset, create_loader
    from timm.data.readers.reader import Reader

    network = load_network(model)

    class Files(Reader):
        def __init__(self, paths: list[str]):
            super().__init__()
            self.paths = paths

        def __getitem__(self, index: int) -> Any:
            return open(self.paths[index], "rb"), 0

        def __len__(self) -> int:
            return len(self.paths)

        def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
            return self.paths[index]

    @torch.inference_mode()
    def score(paths: list[str]) -> int:
        dataset = ImageDataset("", reader=Files(paths))
        loader = create_loader(
            dataset,
            input_size=(3, SIZE, SIZE),
            batch_size=256,
            num_workers=2,
            use_prefetcher=False,
            crop_pct=SIZE / RESIZE,
            device=torch.device("cpu"),
        )
        return sum(len(network(batch).softmax(1).tolist()) for batch, _ in loader)

    return score


def one_by_one(model: Path) -> Scorer:
    """As ultralytics predicts: image after image, batch norm fused into the convolutions where torch.fx can
    trace the network."""
    import torch
    from PIL import Image
    from torch.fx.experimental.optimization import fuse
    from torch.fx.proxy import TraceError

    network, transform = load_network(model), usual_transform()
    with contextlib.suppress(TraceError):
        network = fuse(network)

    @torch.inference_mode()
    def score(paths: list[str]) -> int:
        return sum(
            len(network(transform(Image.open(p).convert("RGB"))[None]).softmax(1).tolist()) for p in paths
        )

    return score


def default_provider(model: Path) -> Scorer:
    """A plain onnxruntime loop: open, resize, crop, stack 32, run the fp32 model with a default session."""
    import numpy as np
    import onnxruntime
    from PIL import Image

    session = onnxruntime.InferenceSession(
        model.with_suffix(".fp32.onnx"), providers=["CPUExecutionProvider"]
    )

    def pixels(path: str) -> Any:
        image = Image.open(path).convert("RGB")
        scale = RESIZE / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR
        )
        left, upper = (image.width - SIZE) // 2, (image.height - SIZE) // 2
        return np.asarray(image.crop((left, upper, left + SIZE, upper + SIZE)))

    def score(paths: list[str]) -> int:
        rows = 0
        for first in range(0, len(paths), 32):
            batch = np.stack([pixels(p) for p in paths[first : first + 32]])
            rows += len(session.run(["probabilities"], {"images": batch})[0])
        return rows

    return score


def purebred(precision: str, provider: str = "cpu", arithmetic: str = "fp32") -> Callable[[Path], Scorer]:
    """What serve/main.py does."""

    def prepare(model: Path) -> Scorer:
        from serve.batch import default_batch_size, score
        from serve.contract.images import read_image_file
        from serve.inputs.inventory import Entry
        from serve.predictor import Predictor

        file = model.with_suffix(f".{precision}.onnx")
        threads = 1 if provider == "cpu" else 0
        predictor = Predictor(file, provider, threads, arithmetic, allow_unverified=True)

        def run(paths: list[str]) -> int:
            entries = (Entry(path) for path in paths)
            rows = score(
                predictor, entries, lambda e: read_image_file(e.name), default_batch_size(predictor)
            )
            return sum(not row.error for row in rows)

        return run

    return prepare


def limit(precision: str, what: str) -> Callable[[Path], Scorer]:
    """Only decoding, or only the model, by a thread a processor: the limit of any pipeline."""

    def prepare(model: Path) -> Scorer:
        import numpy as np

        from serve.batch import default_batch_size
        from serve.contract.images import load_image, read_image_file
        from serve.predictor import Predictor

        predictor = Predictor(model.with_suffix(f".{precision}.onnx"), "cpu", 1, allow_unverified=True)
        size = default_batch_size(predictor)

        def decode(paths: Iterator[list[str]]) -> None:
            for chunk in paths:
                for path in chunk:
                    predictor.preprocess(load_image(read_image_file(path), predictor.decode))

        def infer(paths: Iterator[list[str]]) -> None:
            pixels = np.random.default_rng(0).integers(0, 256, (size, SIZE, SIZE, 3), np.uint8)
            for chunk in paths:
                predictor.predict(pixels[: len(chunk)])

        def run(paths: list[str]) -> int:
            workers = len(os.sched_getaffinity(0))
            chunks = [paths[i : i + size] for i in range(0, len(paths), size)]
            target = decode if what == "decode" else infer
            threads = [
                threading.Thread(target=target, args=(iter(chunks[i::workers]),)) for i in range(workers)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return len(paths)

        return run

    return prepare


LOOPS: dict[str, Callable[[Path], Scorer]] = {
    "plain": plain,
    "dataloader": dataloader,
    "timm_like": timm_like,
    "one_by_one": one_by_one,
    "default_provider": default_provider,
    "purebred": purebred("fp32"),
    "purebred_int8": purebred("int8"),
    "openvino_fp32": purebred("fp32", "openvino"),
    "openvino_bf16": purebred("fp32", "openvino", "bf16"),
    "openvino_int8": purebred("int8", "openvino"),
    "decode": limit("fp32", "decode"),
    "model_fp32": limit("fp32", "model"),
    "model_int8": limit("int8", "model"),
}


def cpu_seconds() -> float:
    """Of this process, its threads and the workers that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("--model", type=Path, required=True, help="without suffix")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=500)
    args = parser.parse_args()

    paths = sorted(str(path) for path in args.images.iterdir() if path.suffix == ".jpg")[: args.limit]
    score = LOOPS[args.loop](args.model)
    score(paths[:WARM_UP])
    cpu, started = cpu_seconds(), time.perf_counter()
    rows = score(paths)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    assert rows == len(paths), (rows, len(paths))
    print(json.dumps({"images": rows, "seconds": seconds, "cpu_seconds": cpu}))


if __name__ == "__main__":
    main()

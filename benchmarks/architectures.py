"""Every named architecture, trained for the same short budget, exported and verified: one table.

    python benchmarks/architectures.py --data DIR --epochs 5 --per-class 1000

Runs train/main.py under torchrun and export/main.py, as a user would, one network after the other. Prints a
Markdown table and writes it to --output after each. A network that fails has its error there, and the exit
code is then 1. Budgets are small: the accuracies say how soon networks learn from little, without
pretrained weights, and nothing about how good they become.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train.data.layouts.label_file import write_label_file  # noqa: E402
from train.data.layouts.registry import find_labels  # noqa: E402
from train.evaluation.significance import share_interval  # noqa: E402

MODELS = (
    *("lenet5", "simple_cnn", "alexnet", "vgg11_bn", "googlenet", "resnet18", "densenet121"),
    *("timm/senet154", "resnext50_32x4d", "mnasnet1_0", "nasnetalarge", "efficientnet_b0"),
    *("mobilenet_v3_small", "convnext_tiny", "vit_tiny_patch16_224", "swin_t"),
)
HEADER = (
    "| model | parameters | images/s in training | validation accuracy (95 %) | "
    "largest difference of probabilities | of logits | same class |\n|---|---|---|---|---|---|---|\n"
)


def draw(source: Path, per_class: int, val_per_class: int, folder: Path) -> list[str]:
    """Flags for train/main.py: label files of so many images of each class, drawn by lot, no overlap."""
    found = find_labels(source, "auto")
    root, labels = found.root, found.labels
    parts: dict[str, list[str]] = {"data": [], "val_data": []}
    for name in sorted(set(labels.values())):
        images = sorted(path for path, label in labels.items() if label == name)
        Random(0).shuffle(images)
        if per_class + val_per_class > len(images):
            raise ValueError(
                f"{source} has {len(images)} images of {name!r}, fewer than --per-class {per_class} and "
                f"--val-per-class {val_per_class} together"
            )
        parts["data"] += images[:per_class]
        parts["val_data"] += images[per_class : per_class + val_per_class]
    flags = []
    for flag, images in parts.items():
        file = folder / f"{flag}.csv"
        paths = [str((root / path).resolve()) for path in images]
        write_label_file(file, paths, [labels[path] for path in images])
        flags.append(f"--{flag}={file}")
    return flags


def command(*arguments: str, folder: Path) -> str:
    """What it printed.

    Raises:
        RuntimeError: it failed; the message is its own last error.
    """
    done = subprocess.run(arguments, cwd=folder, text=True, capture_output=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        errors = [line for line in lines if line.lower().startswith(("error: ", "failed: "))]
        raise RuntimeError((errors or lines or ["no output"])[-1])
    return done.stdout


def measure(model: str, processes: int, settings: Sequence[str], folder: Path) -> str:
    """A row of the table."""
    run = folder / "runs" / model.replace("/", "-")
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    printed = command(
        *(torchrun, "--standalone", f"--nproc_per_node={processes}", str(ROOT / "train" / "main.py")),
        *(f"--model={model}", f"--name={run.name}", "--track=false", *settings),
        folder=folder,
    )
    parameters = re.search(r"with ([\d,]+) parameters", printed)
    assert parameters is not None
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rate = statistics.median(row["images_per_second"] for row in rows[-max(1, len(rows) - 1) :])
    command(sys.executable, str(ROOT / "export" / "main.py"), f"--run={run}", folder=folder)
    report = json.loads((run / "export" / "verification.json").read_text())
    n = report["num_images"]
    accuracy = share_interval(round(report["accuracy_served"] * n), n)
    return (
        f"| {model} | {parameters[1]} | {rate:.0f} | "
        f"{accuracy.value:.3f} ({accuracy.low:.3f} to {accuracy.high:.3f}) | "
        f"{report['max_difference_probabilities']:.0e} | {report['max_difference_logits']:.0e} | "
        f"{report['argmax_agreement']:.2%} |"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="labelled images, as of train/main.py")
    add("--models", nargs="+", default=list(MODELS), help="default: all")
    add("--image-size", type=int, default=64, help="default: %(default)s")
    add("--epochs", type=int, default=5, help="default: %(default)s")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--lr", type=float, default=1e-3, help="of AdamW (default: %(default)s)")
    add("--per-class", type=int, default=1000, help="training images of each class (default: %(default)s)")
    add("--val-per-class", type=int, default=500, help="validation images of each class (%(default)s)")
    add("--processes", type=int, default=1, help="default: %(default)s")
    add("--output", type=Path, default=Path("architectures.md"), help="default: %(default)s")
    args = parser.parse_args(argv)

    table, failed = HEADER, 0
    print(table, end="", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = draw(args.data, args.per_class, args.val_per_class, folder) + ["--optimizer=adamw"]
        for name in ("image_size", "epochs", "batch_size", "lr"):
            settings.append(f"--{name}={getattr(args, name)}")
        for model in args.models:
            try:
                row = measure(model, args.processes, settings, folder)
            except RuntimeError as error:
                row, failed = f"| {model} | {error} | | | | |", failed + 1
            print(row, flush=True)
            table += row + "\n"
            args.output.write_text(table, encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

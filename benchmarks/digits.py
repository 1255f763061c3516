"""Another task, unchanged: scikit-learn's ten classes of handwritten digits, written out as images.

python benchmarks/digits.py [flags of train/main.py]

1,797 digits of 8x8 pixels become 32x32 PNG files in a folder for each class; then the real commands train
with two processes, export and verify.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[1]
SIDE = 32
FLAGS = ["--model", "simple_cnn", "--image-size", str(SIDE), "--epochs", "20", "--batch-size", "64"]
FLAGS += ["--flip", "0", "--crop-scale", "0.7", "--ema", "0.99"]  # a mirrored 2 is no 2


def write_digits(folder: Path) -> None:
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        write_digits(Path(work) / "digits")
        train = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        train += [str(ROOT / "train" / "main.py"), "--data", "digits", "--name", "digits"]
        subprocess.run([*train, "--track", "false", *FLAGS, *sys.argv[1:]], cwd=work, check=True)
        export = [sys.executable, str(ROOT / "export" / "main.py"), "--run", "runs/digits"]
        subprocess.run(export, cwd=work, check=True)


if __name__ == "__main__":
    main()

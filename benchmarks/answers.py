"""What each way to answer is worth, on one trained run: size, mirror image, temperature, clipping.

python benchmarks/answers.py --run runs/NAME --sizes 96 112 128 144 160

Every row uses the same weights and the same validation images, so that differences are paired: McNemar's
exact test for accuracy, Student's interval of the mean difference for log loss. Temperatures are fitted on
the other half of the images.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray

from export.validation_images import ValidationImages
from serve.contract.images import load_image, read_image_file
from serve.contract.preprocess import Preprocess
from train.checkpoint import load_checkpoint
from train.engine.device import keep_freed_memory
from train.evaluation.calibration import calibration_error, fit_temperature, log_probabilities
from train.evaluation.significance import accuracy_interval, mean_interval, paired_test
from train.models.build import rebuild
from train.models.classifier import ImageClassifier

BATCH = 64
CLIP = 0.005


@torch.inference_mode()
def logits_of(
    model: ImageClassifier, images: ValidationImages, preprocess: Preprocess
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(of the image, of its mirror image), each [N, num_classes], without temperature."""
    plain, mirrored = [], []
    for start in range(0, len(images.paths), BATCH):
        files = [images.root / path for path in images.paths[start : start + BATCH]]
        pixels = torch.from_numpy(
            np.stack([preprocess(load_image(read_image_file(f), preprocess.decode)) for f in files])
        )
        plain.append(model(pixels).double().numpy())
        mirrored.append(model(pixels.flip(2)).double().numpy())
    return np.concatenate(plain), np.concatenate(mirrored)


def cross_fitted(
    logits: NDArray[np.float64], labels: NDArray[np.int64], clip: float
) -> NDArray[np.float64]:
    """Log probabilities in which each half of the images has the temperature fitted on the other half."""
    values = np.empty_like(logits)
    halves = (slice(0, None, 2), slice(1, None, 2))
    for fitted, applied in (halves, halves[::-1]):
        temperature = fit_temperature(logits[fitted], labels[fitted])
        values[applied] = log_probabilities(logits[applied], temperature, clip)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="*", default=[])
    args = parser.parse_args()
    keep_freed_memory()
    checkpoint = load_checkpoint(args.run / "checkpoints" / "best.pt")
    images = ValidationImages.of_run(args.run, checkpoint)
    names = list(checkpoint["class_names"])
    labels = np.array([names.index(label) for label in images.labels])
    rows = np.arange(len(labels))
    model = rebuild(checkpoint)
    model.flip_tta = False
    model.temperature.fill_(1.0)
    served = Preprocess.from_dict(checkpoint["preprocess"])

    answers: dict[str, NDArray[np.float64]] = {}
    for size in sorted({served.size, *args.sizes}):
        resize = round(served.resize_size * size / served.size)
        preprocess = replace(served, size=size, resize_size=resize)
        plain, mirrored = logits_of(model, images, preprocess)
        both = (plain + mirrored) / 2
        answers[f"{size} px"] = log_probabilities(plain)
        answers[f"{size} px, mirror image"] = log_probabilities(both)
        if size == served.size:
            answers[f"{size} px, temperature"] = cross_fitted(plain, labels, 0.0)
            answers[f"{size} px, mirror image, temperature"] = cross_fitted(both, labels, 0.0)
            answers[f"{size} px, mirror image, temperature, clip {CLIP}"] = cross_fitted(both, labels, CLIP)

    base = answers[f"{served.size} px"]
    right, loss = base.argmax(1) == labels, -base[rows, labels]
    print(f"{args.run}: {checkpoint['config']['model']}, {len(labels)} validation images\n")
    print("| answer | accuracy | log loss | ECE | against the first: accuracy (p) | log loss |")
    print("|---|---|---|---|---|---|")
    for name, values in answers.items():
        correct, losses = values.argmax(1) == labels, -values[rows, labels]
        a, m = accuracy_interval(correct), mean_interval(losses)
        test = paired_test(correct, right, losses, loss)
        print(
            f"| {name} | {a.value:.4f} [{a.low:.4f}, {a.high:.4f}] "
            f"| {m.value:.4f} [{m.low:.4f}, {m.high:.4f}] "
            f"| {calibration_error(values.max(1), correct):.4f} "
            f"| {test.accuracy.value:+.4f} (p {test.p:.2g}) "
            f"| {test.log_loss.value:+.4f} [{test.log_loss.low:+.4f}, {test.log_loss.high:+.4f}] |",
            flush=True,
        )


if __name__ == "__main__":
    main()

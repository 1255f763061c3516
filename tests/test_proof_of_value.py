"""A change that should not alter results does not: digests of one fixed run, its export and its scores.

Arithmetic is not the same on all processors, nor in all versions of torch: `tests/proof_of_value.json` has
an entry for each that was seen. Whoever changes results on purpose writes its entry anew, by
`PUREBRED_WRITE_PROOF=1 python -m pytest tests/test_proof_of_value.py`, and says why.
"""

import csv
import hashlib
import json
import os
import platform
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import PIL
import pytest
import torch
from conftest import REPOSITORY
from forked import run, train

from train.checkpoint import load_checkpoint

PROOF = REPOSITORY / "tests" / "proof_of_value.json"
SETTINGS = [
    *("--model", "resnet18", "--image-size", 32, "--batch-size", 32, "--epochs", 3, "--optimizer", "sgd"),
    *("--lr", 0.02, "--cutmix", 1.0, "--ema", 0.9, "--deterministic", "--precision", "fp32", "--seed", 5),
    *("--num-workers", 0, "--track", "false", "--name", "fixed"),
]


def environment() -> str:
    """What the bits of a float32 result depend on besides the code."""
    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    fields = dict(re.findall(r"^(vendor_id|cpu family|model|stepping)\s*: (.*)$", text, re.MULTILINE))
    processor = " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *fields.values()])
    versions = f"torch {torch.__version__.split('+')[0]}, onnxruntime {onnxruntime.__version__}"
    return f"{versions}, Pillow {PIL.__version__}, {processor}"


def digest_of_weights(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def digest_of_graph(path: Path) -> str:
    """Return the sha256 of the exported graph without metadata, which name versions and source lines."""
    model = onnx.load(path)
    parts = [model, model.graph, *model.functions, *model.graph.node, *model.graph.value_info]
    parts += [*model.graph.input, *model.graph.output, *model.graph.initializer]
    for part in (*parts, *(node for function in model.functions for node in function.node)):
        del part.metadata_props[:]
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


@pytest.fixture(scope="module")
def fixed(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, cutmix, a moving average, stopped after the first epoch and resumed."""
    cwd = tmp_path_factory.mktemp("fixed")
    data = ["--data", sample / "train"]
    train(2, *data, *SETTINGS, "--stop-after", 1, cwd=cwd)
    train(2, *data, *SETTINGS, "--resume", "auto", "--stop-after", 0, cwd=cwd)
    folder = cwd / "runs" / "fixed"
    run("export/main.py", "--run", folder, cwd=cwd)
    model = folder / "export" / "model.onnx"
    run(
        "serve/main.py",
        *("--model", model, "--images", sample / "test", "--threads", 1),
        *("--output", cwd / "scores.csv"),
        cwd=cwd,
    )
    return cwd


def test_weights_export_and_scores_are_those_of_before(fixed: Path) -> None:
    folder = fixed / "runs" / "fixed"
    state = load_checkpoint(folder / "checkpoints" / "last.pt")
    scores = (fixed / "scores.csv").read_bytes()
    with (fixed / "scores.csv").open(newline="", encoding="utf-8") as file:
        dogs = [float(row["probability_dog"]) for row in csv.DictReader(file)]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    exact = {
        "weights": digest_of_weights(state["model"]),
        "ema": digest_of_weights(load_checkpoint(folder / "checkpoints" / "best.pt")["model"]),
        "export": digest_of_graph(folder / "export" / "model.onnx"),
        "scores": hashlib.sha256(scores).hexdigest(),
    }
    close = {
        "train/loss": [row["train/loss"] for row in metrics],
        "val/log_loss": [row["val/log_loss"] for row in metrics],
        "probability_dog": [float(np.mean(dogs))],
    }
    proof = json.loads(PROOF.read_text()) if PROOF.is_file() else {"close": {}, "exact": {}}
    if "PUREBRED_WRITE_PROOF" in os.environ:
        proof = {"close": close, "exact": proof["exact"] | {environment(): exact}}
        PROOF.write_text(json.dumps(proof, indent=1) + "\n")
    for name, values in close.items():
        # rounding grows in a few steps: an Intel and an AMD processor differ by 0.029 after three epochs
        assert proof["close"][name] == pytest.approx(values, abs=0.06), name
    assert proof["exact"].get(environment(), exact) == exact

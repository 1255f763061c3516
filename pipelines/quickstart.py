"""Quickstart: draw a sample of cats and dogs, train on it, export, verify and score; `make run` runs it.

    python pipelines/quickstart.py

Nothing is downloaded. Replaces data/sample and runs/sample in the working directory.

Exit code: 0, or that of the step that failed.
"""

import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not pipelines/, belongs on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from serve.contract.installation import require

require("train", "torch", "psutil")

import json
import os
import shutil
import subprocess

from pipelines.launch import run_program
from serve.contract.interrupts import end_on_signal

DATA, RUN = Path("data/sample"), Path("runs/sample")


def main() -> int:
    """Return the exit code."""
    try:
        quickstart()
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    return 0


def quickstart() -> None:
    """Run every stage, each a command that can be typed by itself, and print what to look at."""
    model, predictions = RUN / "export" / "model.onnx", RUN / "predictions.csv"
    shutil.rmtree(RUN, ignore_errors=True)

    run_program("train/data/sample.py", "--output", DATA)

    settings = ["--model", "simple_cnn", "--image-size", 64, "--epochs", 15, "--crop-scale", 0.6]
    run_program("train/main.py", "--data", DATA / "train", *settings, "--name", RUN.name, processes=2)

    run_program("export/main.py", "--run", RUN)  # verifies too: there is no model.onnx otherwise

    run_program("serve/main.py", "--model", model, "--images", DATA / "test", "--output", predictions)

    verification = json.loads((RUN / "export" / "verification.json").read_text(encoding="utf-8"))
    accuracy, count = verification["accuracy_served"], verification["num_images"]
    print(
        f"\nvalidation accuracy  {accuracy:.3f} on {count} drawn images\n"
        f"run directory        {RUN}\n"
        f"ONNX model           {model}\n"
        f"predictions          {predictions}\n"
        f"report               {RUN / 'report.html'}\n"
        f"compare runs         {mlflow_command()} ui --backend-store-uri sqlite:///mlflow.db"
    )


def mlflow_command() -> str:
    """Return the path of this environment's mlflow, from the working directory where it is within it."""
    script = Path(sys.executable).with_name("mlflow")
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())

"""Write an exported model into a Triton model repository.

    python export/triton.py --run runs/NAME --repository models/
    tritonserver --model-repository models/

writes models/NAME/config.pbtxt, models/NAME/labels.txt and models/NAME/1/model.onnx; the next call adds
version 2 of the same classes and input, which Triton then serves. Clients send uint8 pixels prepared with
serve/contract/preprocess.py (the file's metadata say how) and get logits and probabilities. It runs on
GPUs if the model was verified on them (--verify-provider cuda), else on the CPU; on GPUs start Triton with
NVIDIA_TF32_OVERRIDE=0, for verified is float32.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, not export/
    from serve.contract.interrupts import end_on_signal

    end_on_signal(importing=True)

from serve.contract.command_line import CommandLine, Number
from serve.contract.errors import UserError
from serve.contract.installation import require

require("train", "torch")

import argparse
import json
import re
import shutil
from collections.abc import Sequence

from export.record import MODEL_FILES, verified_model
from export.run_copy import open_run_folder
from serve.contract.metadata import INPUT_NAME, LOGITS_NAME, PROBABILITIES_NAME, ModelMetadata
from serve.contract.urls import is_remote, redact
from serve.outcome import report_error

MAX_BATCH_SIZE = 64
QUEUE_MICROSECONDS = 2000  # how long a request waits for others to share its batch
INSTANCE_KINDS = {"cuda": "KIND_GPU", "cpu": "KIND_CPU"}  # the first that the model was verified on
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine("export/triton.py", __doc__, "--run RUN --repository FOLDER [options]")
    add = parser.add_argument
    add("--run", required=True, help="run directory with an exported model, or its URL")
    add("--repository", required=True, help="folder of the model repository; made if it does not exist")
    add("--name", default="", help="of the model in Triton (default: the run's name)")
    add("--model-precision", choices=MODEL_FILES, default="fp32", help="which file")
    add(
        "--max-batch-size",
        type=Number(int, 1),
        default=MAX_BATCH_SIZE,
        help="images in a batch that Triton collects",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 written, 2 unusable arguments or files, 3 an error that may pass."""
    args = build_parser().parse_args(argv)
    try:
        with open_run_folder(args.run, writes=False) as run:
            name = args.name or run.name
            if is_remote(args.repository):
                raise UserError(
                    f"--repository {redact(args.repository)} is a URL: name a folder, and copy it there"
                )
            version = write(run, Path(args.repository), name, args.model_precision, args.max_batch_size)
    except (UserError, OSError) as error:
        return report_error(error)
    print(f"in the model repository: {version}")
    return 0


def write(run: Path, repository: Path, name: str, precision: str, max_batch_size: int) -> Path:
    """Add the run's verified model of this precision as the newest version; returns its folder.

    Raises:
        UserError: no such model, a name that Triton or a file system cannot take, or the repository holds
            a model of this name with other classes or another input.
    """
    if not MODEL_NAME.fullmatch(name):
        raise UserError(f"--name {name!r} must hold letters, digits, '.', '_' and '-' only")
    file, metadata, _ = verified_model(run, precision)
    if not any(metadata.is_verified(provider, "fp32") for provider in INSTANCE_KINDS):
        raise UserError(f"{file} is verified neither for cuda:fp32 nor for cpu:fp32, which Triton needs")
    if broken := [label for label in metadata.class_names if "\n" in label or "\r" in label]:
        raise UserError(f"class names hold line breaks, and labels.txt has one name a line: {broken[:3]}")
    model = repository / name
    texts = {
        "config.pbtxt": config(name, metadata, max_batch_size),
        "labels.txt": "".join(f"{label}\n" for label in metadata.class_names),
    }
    for other, text in texts.items():
        path = model / other
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{path} describes another model; take another --name, or remove {model} and its versions"
            )
    model.mkdir(parents=True, exist_ok=True)
    for other, text in texts.items():
        (model / other).write_text(text, encoding="utf-8")
    numbers = [int(folder.name) for folder in model.iterdir() if folder.name.isdecimal()]
    version = model / str(max(numbers, default=0) + 1)
    temporary = model / f".{version.name}.tmp"  # Triton looks at folders with a number only
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    shutil.copyfile(file, temporary / "model.onnx")
    temporary.rename(version)
    return version


def config(name: str, metadata: ModelMetadata, max_batch_size: int) -> str:
    """Return the text of config.pbtxt (Triton's model_config.proto); the server forms batches."""
    size, classes = metadata.preprocess.size, len(metadata.class_names)
    kind = next(k for provider, k in INSTANCE_KINDS.items() if metadata.is_verified(provider, "fp32"))
    outputs = ",\n".join(
        f'  {{ name: "{output}", data_type: TYPE_FP32, dims: [ {classes} ], label_filename: "labels.txt" }}'
        for output in (LOGITS_NAME, PROBABILITIES_NAME)
    )
    return f"""name: {json.dumps(name)}
backend: "onnxruntime"
max_batch_size: {max_batch_size}
input [
  {{ name: "{INPUT_NAME}", data_type: TYPE_UINT8, dims: [ {size}, {size}, 3 ] }}
]
output [
{outputs}
]
instance_group [ {{ kind: {kind} }} ]
dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_MICROSECONDS} }}
version_policy: {{ latest: {{ num_versions: 1 }} }}
"""


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())

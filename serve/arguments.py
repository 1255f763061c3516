"""Command line of serve/main.py: its options, and which of them go together."""

import argparse
from pathlib import Path

from serve.contract.command_line import CommandLine, Number
from serve.contract.errors import UserError
from serve.contract.images import MAX_MEGAPIXELS, check_megapixels
from serve.contract.listing import has_image_suffix
from serve.mlflow_models import FORMS
from serve.outcome import add_outcome_options
from serve.outputs.csv_file import CSV
from serve.outputs.formats import FORMATS
from serve.outputs.layout import Format
from serve.providers.registry import ALL_PRECISIONS, PROVIDERS
from serve.shards import Shard


def build_parser(doc: str = "") -> CommandLine:
    """Return the command line, with the usual flags first; `doc` is its description."""
    parser = CommandLine("serve/main.py", doc, "--model MODEL --images IMAGES [--output FILE] [options]")
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="ONNX file written by export/main.py, a run directory, a URL of either, or a model of the "
        f"MLflow server at MLFLOW_TRACKING_URI: {FORMS}",
    )
    add(
        "--images",
        required=True,
        help="folder (searched recursively), image, .tar, pattern ('*.tar', '{000..099}.tar'), .txt list "
        "of paths, .csv with a column of them; or a URL of one (s3://, gs://, https://, ...)",
    )
    add(
        "--output",
        default="",
        metavar="FILE",
        help="file, with --shard a folder, or its URL (default: predictions.csv, with --shard predictions)",
    )
    add("--format", choices=FORMATS, default="", help="of --output (default: by its suffix, else csv)")
    add("--top-k", type=Number(int), default=0, metavar="K", help="the K likeliest classes; 0: all")
    add(
        "--overwrite",
        action="store_true",
        help="replace --output and --summary even if they are no outputs of this command",
    )
    _add_output_options(parser.add_argument_group("further output"))
    _add_hardware_options(parser.add_argument_group("hardware"))
    _add_job_options(parser.add_argument_group("large jobs"))
    return parser


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--embeddings", action="store_true", help="also the input of the last layer (jsonl, parquet)")
    add(
        "--sample-submission",
        default="",
        metavar="FILE",
        help="a contest's sample: the output gets its header, its ids in their order, and such values",
    )
    add(
        "--submission-values",
        choices=("probability", "class"),
        default="",
        help="what they hold, where the sample shows 0 and 1 and may mean either",
    )
    add(
        "--track",
        action="store_true",
        help="log the scoring run to the MLflow server at MLFLOW_TRACKING_URI, with the model and its "
        "training run",
    )
    add_outcome_options(group)


def _add_hardware_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--provider", choices=("auto", *PROVIDERS), default="auto", help="of onnxruntime")
    add("--precision", choices=ALL_PRECISIONS, default="fp32", help="arithmetic of the provider")
    add("--allow-unverified", action="store_true", help="use a provider that the model was not verified on")
    add("--device-id", type=Number(int), default=0, metavar="N", help="number of the GPU")
    add(
        "--engine-cache",
        type=Path,
        metavar="DIR",
        help="TensorRT's engines (default: ~/.cache/purebred/tensorrt)",
    )
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="images in a call (default: on the cpu provider 4 of 224 pixels, 1 to 32 of others, else 64, "
        "on GPUs 128 in 16 bits)",
    )
    add(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="threads that read, decode and score; 0: one a processor, more if reading is slow",
    )
    add(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="inference threads of all workers together; 0: processors / workers",
    )
    add(
        "--image-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="for reading and decoding one image, then it gets an error row; 0: none",
    )
    add(
        "--max-megapixels",
        type=float,
        default=MAX_MEGAPIXELS,
        metavar="N",
        help="millions of pixels above which an image gets an error row; each that is decoded at the same "
        "time takes 4 bytes a pixel",
    )


def _add_job_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--resume", action="store_true", help="keep what an earlier call, killed or not, has finished")
    add(
        "--shard",
        metavar="I/N",
        default="",
        help="score part I of N, counted from 0; auto takes both from the scheduler (SLURM, AWS Batch, "
        "Google Batch, Cloud Run), auto/N takes I (Kubernetes); serve/merge.py joins the parts",
    )
    add(
        "--part-size",
        type=Number(int, 1),
        default=100_000,
        metavar="ROWS",
        help="rows that a killed call loses at most",
    )


def check_options(args: argparse.Namespace, form: Format, shard: Shard | None) -> None:
    """Raise UserError for values outside their limits, or that do not go together."""
    name = args.output or ""
    if not shard and (has_image_suffix(name) or name.lower().endswith(".tar")):
        raise UserError(f"--output {name!r} has the name of an image or a tar file, and might replace one")
    check_megapixels(args.max_megapixels)
    if args.submission_values and not args.sample_submission:
        raise UserError(
            f"--submission-values {args.submission_values} has no effect without --sample-submission"
        )
    if args.sample_submission and (shard or args.resume or args.top_k or form is not CSV):
        raise UserError(
            "--sample-submission gives one CSV file: leave out --shard, --resume, --top-k and other formats"
        )
    if args.embeddings and not form.embeddings:
        raise UserError(f"--embeddings needs --format jsonl or parquet: {form.name} holds no vectors")
    form.check_installed()

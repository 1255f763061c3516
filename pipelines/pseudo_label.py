"""Semi-supervised training: a teacher labels images, and a student learns from them under augmentation.

python pipelines/pseudo_label.py --teacher runs/NAME --unlabelled DIR --rounds 2 -- FLAGS OF train/main.py

Each round exports the teacher unless that was done, scores the unlabelled images with serve/main.py, and
trains a student on the confident predictions and the labelled images; the student is the next round's
teacher (noisy student, arXiv 1911.04252; teacher and student on far more images, arXiv 1905.00546). The
flags after -- are the student's: its noise is augmentation, dropout, drop path. The same command resumes an
interrupted round, and repeats no finished one.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, not pipelines/
    from serve.contract.interrupts import end_on_signal

    end_on_signal(importing=True)

from serve.contract.command_line import CommandLine, Number
from serve.contract.errors import UserError
from serve.contract.installation import require
from serve.contract.urls import is_remote

require("train", "torch")

import argparse
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.launch import exit_code_of, run_program, split_flags
from pipelines.teacher import check_skill, score_folder, select, warn_of_collapse, without_labelled
from serve.contract.files import atomic_write
from serve.contract.listing import list_images
from train.checkpoint import best_checkpoint, last_checkpoint, load_checkpoint
from train.cli import given_values, parse_config
from train.config import TrainConfig
from train.data.index import ImageSet, prepare_data
from train.data.labels import describe_counts
from train.data.layouts.label_file import write_label_file
from train.runs.note import export_command
from train.settings import refuse_given


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine(
        "pipelines/pseudo_label.py", __doc__, "--teacher RUN --unlabelled DIR [options] [-- TRAINING FLAGS]"
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="run directory of the first teacher")
    add("--unlabelled", type=Path, required=True, help="folder of images without labels")
    add("--rounds", type=Number(int, 1, 1000), default=1, help="students, each the next one's teacher")
    add("--threshold", type=Number(float, 0, 1), default=0.9, help="least probability of a label")
    add("--labels", choices=("hard", "soft"), default="soft", help="the class, or all probabilities")
    add("--balance", action="store_true", help="take equally many of each class, the most confident ones")
    add("--nproc_per_node", type=Number(int, 1, 4096), default=1, help="processes of each student")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or that of the step that failed, or 2 for unusable arguments."""
    own, flags = split_flags(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(own)
    return exit_code_of(lambda: run(args, flags))


def run(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Train the students of all rounds."""
    student = check_arguments(args, flags)
    checkpoint = load_checkpoint(best_checkpoint(args.teacher))
    name = student.name or f"{checkpoint['run_name']}-student"
    folder = Path(student.output) / f"{name}-labels"
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder / "settings.json", args)

    config = TrainConfig(**checkpoint["config"])
    teacher, data = args.teacher, prepare_data(config)
    if data.digest != checkpoint["data_digest"]:
        raise UserError(
            f"--teacher {args.teacher}: its data, {config.data}, changed since it was trained: "
            "restore them, or train the teacher again"
        )
    val = folder / "val.csv"
    write_label_file(val, *labelled(data.val))
    for number in range(1, args.rounds + 1):
        label_file = folder / f"train-{number}.csv"
        if not label_file.exists():  # one that exists is whole: it is renamed into place
            check_skill(teacher)
            scores = folder / f"scores-{number}.csv"
            found = score_folder(teacher, args.unlabelled, scores, student.max_megapixels)
            chosen = select(without_labelled(found, data, config), args.threshold, args.balance)
            counts = f"{len(chosen.paths)} are used: {describe_counts(chosen.counts())}"
            print(f"round {number}: of {len(found.paths)} unlabelled images {counts}", flush=True)
            for warning in () if args.balance else warn_of_collapse(chosen.counts(), data.train.counts()):
                print(warning, file=sys.stderr)
            paths, names = labelled(data.train)
            soft = soft_labels(data.train)
            if args.labels == "soft":
                soft |= dict(zip(chosen.paths, chosen.probabilities, strict=True))
            write_label_file(
                label_file, paths + chosen.paths, names + chosen.names, soft, chosen.class_names
            )
        teacher = Path(student.output) / f"{name}-{number}"
        resumed = ["--resume", teacher, "--name", teacher.name] if last_checkpoint(teacher).exists() else []
        new = ["--name", teacher.name, "--output", student.output]
        own = [*data_flags(label_file, val), *(resumed or new)]
        run_program("train/main.py", *flags, *own, processes=args.nproc_per_node)
    print(f"last student: {teacher}\nnext: {export_command(str(teacher))}")


def check_arguments(args: argparse.Namespace, flags: Sequence[str]) -> TrainConfig:
    """Return the student's settings. Raises UserError when one conflicts with what students get."""
    student, own = parse_config(flags), data_flags(Path("train.csv"), Path("val.csv"))
    refuse_given(student, given_values(own), "pipelines/pseudo_label.py")
    parse_config([*flags, *own])
    if is_remote(student.output):
        raise UserError(f"--output {student.output}: rounds need a local folder; copy it afterwards")
    if not args.unlabelled.is_dir() or not list_images(args.unlabelled).paths:
        raise UserError(
            f"--unlabelled {str(args.unlabelled)!r} is no local folder of images; unpack tar files first"
        )
    return student


def data_flags(label_file: Path, val: Path) -> list[str]:
    """Return the flags that give a student its training images and the teacher's validation images."""
    return [f"--data={label_file}", f"--val-data={val}", "--data-format=csv", "--columns=", "--exclude="]


def check_settings(file: Path, args: argparse.Namespace) -> None:
    """Record how images are labelled in the first call, and require the same in later ones.

    Raises:
        UserError: a setting changed, and rounds that are finished would not follow it.
    """
    settings = {name: getattr(args, name) for name in ("threshold", "labels", "balance")}
    settings |= {name: str(getattr(args, name).resolve()) for name in ("teacher", "unlabelled")}
    if file.exists():
        try:
            before = json.loads(file.read_text())
            before = {name: before[name] for name in settings}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is of another command: give the student another --name") from error
        pairs = [(name, before[name], value) for name, value in settings.items()]
        changed = ", ".join(f"--{name} {old} -> {new}" for name, old, new in pairs if old != new)
        if changed and any(file.parent.glob("train-*.csv")):
            raise UserError(
                f"{file.parent} holds rounds with other settings ({changed}): give those, or the student "
                "another --name"
            )
        if changed:  # no round is labelled yet
            for scores in file.parent.glob("scores-*.csv"):
                scores.unlink()
    elif any(file.parent.iterdir()):
        raise UserError(f"{file.parent} holds other files: give the student another --name")
    with atomic_write(file, "w") as opened:
        opened.write(json.dumps(settings, indent=1) + "\n")


def labelled(images: ImageSet) -> tuple[list[str], list[str]]:
    """Return absolute paths and class names."""
    root = images.root.resolve()
    return [str(root / path) for path in images.paths], [images.class_names[i] for i in images.labels]


def soft_labels(images: ImageSet) -> dict[str, NDArray[np.float64]]:
    """Return the probabilities by absolute path of images that have them as labels."""
    if images.targets is None:
        return {}
    return dict(zip(labelled(images)[0], images.targets.astype(np.float64), strict=True))


if __name__ == "__main__":
    end_on_signal("; the same command continues with what is not finished")
    sys.exit(main())

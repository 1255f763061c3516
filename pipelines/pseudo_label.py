"""Semi-supervised training: a teacher labels images, a noised student learns from labels and guesses.

python pipelines/pseudo_label.py --teacher runs/NAME --unlabelled DIR --rounds 2 -- FLAGS OF train/main.py

Each round exports the teacher unless that was done, scores the unlabelled images with serve/main.py, takes
the confident predictions and trains a student on them and the labelled images; the student is the next
round's teacher (noisy student, arXiv 1911.04252; teacher and student on far more images, arXiv 1905.00546).
The flags after -- are the student's: its noise is augmentation, dropout, drop path. A round that was
finished is not repeated; one that was interrupted goes on.
"""

import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not pipelines/, belongs on sys.path
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

if __name__ == "__main__":  # before the imports that take seconds
    from serve.contract.interrupts import end_on_signal

    end_on_signal(importing=True)

from serve.contract.errors import UserError
from serve.contract.installation import require

require("train", "torch")

import argparse
import csv
import json
import shlex
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.launch import run_program
from serve.contract.files import atomic_write, file_sha256
from serve.contract.listing import list_images
from serve.contract.urls import redact
from train.checkpoint import best_checkpoint, last_checkpoint, load_checkpoint
from train.cli import parse_config
from train.config import TrainConfig
from train.data.download import is_remote
from train.data.duplicates import Near, labels_decide, near_duplicates
from train.data.index import Data, ImageSet, groups_of, prepare_data
from train.data.label_file import SOFT_COLUMN, write_manifest
from train.data.scan import scan
from train.evaluation.predictions import read_predictions
from train.evaluation.significance import better_than_largest

LIMITS = {"rounds": (1, 1000), "threshold": (0, 1), "nproc_per_node": (1, 4096)}


@dataclass(frozen=True)
class Guesses:
    """A teacher's answers to unlabelled images."""

    paths: list[str]
    """Absolute."""
    probabilities: NDArray[np.float64]
    """[N, num_classes]"""
    class_names: tuple[str, ...]

    @property
    def labels(self) -> NDArray[np.int64]:
        values: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return values

    def take(self, indices: NDArray[np.int64]) -> "Guesses":
        return Guesses([self.paths[i] for i in indices], self.probabilities[indices], self.class_names)

    @property
    def names(self) -> list[str]:
        return [self.class_names[label] for label in self.labels]

    def counts(self) -> dict[str, int]:
        counts = Counter(self.names)
        return {name: counts[name] for name in self.class_names}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="run directory of the first teacher")
    add("--unlabelled", type=Path, required=True, help="folder of images without labels")
    add("--rounds", type=int, default=1, help="students trained, each the next one's teacher (%(default)s)")
    add("--threshold", type=float, default=0.9, help="least probability of a label (default: %(default)s)")
    add("--labels", choices=("hard", "soft"), default="soft", help="the class, or all probabilities")
    add("--balance", action="store_true", help="take equally many of each class, the most confident ones")
    add("--nproc_per_node", type=int, default=1, help="processes of each student (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or that of the step that failed, or 2 for unusable arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    divider = arguments.index("--") if "--" in arguments else len(arguments)
    own, flags = arguments[:divider], arguments[divider + 1 :]
    args = build_parser().parse_args(own)
    try:
        for name, (lowest, highest) in LIMITS.items():
            value = getattr(args, name)
            if not lowest <= value <= highest:
                raise UserError(f"--{name} {value} is outside {lowest}..{highest}")
        run(args, flags)
    except (UserError, OSError) as error:
        print(f"error: {redact(error)}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: this step failed: {redact(' '.join(map(str, error.cmd)))}", file=sys.stderr)
        return int(error.returncode)
    return 0


def run(args: argparse.Namespace, flags: Sequence[str]) -> None:
    checkpoint = load_checkpoint(best_checkpoint(args.teacher))
    taught = TrainConfig(**checkpoint["config"])
    student = parse_config(list(flags))
    if student.data or student.val_data:
        raise UserError("--data and --val_data are the teacher's and the guesses; leave them out")
    plain = TrainConfig()
    for flag in ("folds", "fold", "exclude", "data_format", "resume", "stop_after"):
        if getattr(student, flag) != getattr(plain, flag):
            raise UserError(f"--{flag} does not go with what students are given; leave it out")
    if is_remote(student.output):
        raise UserError(f"--output {student.output}: rounds need a local folder; copy it afterwards")
    if not args.unlabelled.is_dir() or not list_images(args.unlabelled).paths:
        raise UserError(
            f"--unlabelled {str(args.unlabelled)!r} is no local folder of images; unpack tar files first"
        )
    name = student.name or f"{checkpoint['run_name']}-student"
    folder = Path(student.output) / f"{name}-labels"
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / "settings.json").exists():
        raise UserError(f"{folder} holds other files: give the student another --name")
    check_settings(folder / "settings.json", args)

    teacher, data = args.teacher, prepare_data(taught)
    if data.digest != checkpoint["data_digest"]:
        raise UserError(f"the data of {args.teacher} changed since it was trained: {taught.data}")
    val = folder / "val.csv"
    write_manifest(val, *labelled(data.val))
    for number in range(1, args.rounds + 1):
        manifest = folder / f"train-{number}.csv"
        if not manifest.exists():  # one that is there is whole: it is renamed into place
            check_teacher(teacher)
            guesses = score(teacher, args.unlabelled, folder / f"scores-{number}.csv")
            chosen = select(unknown(guesses, data, taught), args.threshold, args.balance)
            print(
                f"round {number}: of {len(guesses.paths)} unlabelled images {len(chosen.paths)} are used, "
                f"{chosen.counts()}",
                flush=True,
            )
            paths, labels = labelled(data.train)
            soft = soft_labels(data.train)
            paths, labels = paths + chosen.paths, labels + chosen.names
            if args.labels == "soft":
                soft |= dict(zip(chosen.paths, chosen.probabilities, strict=True))
            write_manifest(manifest, paths, labels, soft, chosen.class_names)
        teacher = Path(student.output) / f"{name}-{number}"
        step = ["--resume", teacher] if last_checkpoint(teacher).exists() else []
        new = ["--name", teacher.name, "--output", student.output]
        own = ["--data", manifest, "--val_data", val, *(step or new)]
        run_program("train/main.py", *flags, *own, processes=args.nproc_per_node)
    print(f"last student: {teacher}\nnext: python export/main.py --run {shlex.quote(str(teacher))}")


def check_teacher(run: Path) -> None:
    """
    Raises:
        UserError: the run is not surely better than always naming the largest class.
    """
    predictions = read_predictions(run / "val_predictions.csv")
    if not better_than_largest(predictions.correct, predictions.labels):
        raise UserError(
            f"the teacher {run} is not surely better than always naming the largest class: accuracy "
            f"{predictions.accuracy:.4f} on {len(predictions.paths)} validation images. Its guesses would "
            "mislead a student; train it longer, with --weights or on more images, or validate it on more"
        )


def check_settings(file: Path, args: argparse.Namespace) -> None:
    """Of how images are labelled: noted in the first call, the same in later ones.

    Raises:
        UserError: a setting changed, and rounds that are finished would not follow it.
    """
    settings = {name: getattr(args, name) for name in ("threshold", "labels", "balance")}
    settings |= {name: str(getattr(args, name).resolve()) for name in ("teacher", "unlabelled")}
    if not file.exists():
        with atomic_write(file, "w") as opened:
            opened.write(json.dumps(settings, indent=1) + "\n")
    try:
        before = json.loads(file.read_text())
        before = {name: before[name] for name in settings}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is none of this command: give the student another --name") from error
    changed = [f"--{name} {before[name]} -> {new}" for name, new in settings.items() if before[name] != new]
    if changed and not any(file.parent.glob("train-*.csv")):  # no round is labelled: begin anew
        for path in (file, *file.parent.glob("scores-*.csv")):
            path.unlink()
        check_settings(file, args)
    elif changed:
        raise UserError(
            f"{file.parent} holds rounds with other settings ({', '.join(changed)}): give those, or the "
            "student another --name"
        )


def labelled(images: ImageSet) -> tuple[list[str], list[str]]:
    """(absolute paths, class names)"""
    root = images.root.resolve()
    return [str(root / path) for path in images.paths], [images.class_names[i] for i in images.labels]


def soft_labels(images: ImageSet) -> dict[str, NDArray[np.float64]]:
    """Absolute path -> probabilities, of images that were taught by them."""
    if images.targets is None:
        return {}
    return dict(zip(labelled(images)[0], images.targets.astype(np.float64), strict=True))


def unknown(guesses: Guesses, data: Data, config: TrainConfig) -> Guesses:
    """Without images that show what a labelled one does, re-encoded or resized too: none of validation may
    be trained on, and no label be doubted.

    Raises:
        UserError: none is left.
    """
    cache = Path(config.output) / ".cache"
    labelled = [scan(images.root, images.paths, cache) for images in (data.train, data.val)]
    new = scan(Path("/"), guesses.paths, cache)
    known = {sha256 for result in labelled for sha256 in result.sha256.values()}
    near: dict[str, Near] = {}
    if config.near_duplicates:
        roots = (data.train.root, data.val.root, Path("/"))
        scans = [*labelled, new]
        files = [root / path for root, result in zip(roots, scans, strict=True) for path in result.sha256]
        hashes = [sha256 for result in scans for sha256 in result.sha256.values()]
        near = near_duplicates(files, hashes, np.concatenate([result.thumbnails for result in scans]))
        sets = (data.train, data.val)
        labels = [label for images in sets for label in images.labels.tolist()]
        if labels_decide([group for images in sets for group in groups_of(images, near)], labels, near):
            near = {}  # what looks alike is often not the same here
    taken = known | {near[sha256].group for sha256 in known if sha256 in near}

    def is_new(path: str) -> bool:
        sha256 = new.sha256.get(path)
        if sha256 is None:  # it cannot be read any more
            return False
        return sha256 not in taken and (sha256 not in near or near[sha256].group not in taken)

    kept = np.flatnonzero([is_new(path) for path in guesses.paths])
    if not len(kept):
        raise UserError(
            f"all {len(guesses.paths)} unlabelled images that can be read show what labelled ones do: "
            "there is nothing to learn from them; give --unlabelled other images"
        )
    if len(kept) < len(guesses.paths):
        print(
            f"{len(guesses.paths) - len(kept)} of {len(guesses.paths)} unlabelled images are left out: "
            "they show what labelled ones do, or cannot be read any more",
            flush=True,
        )
    return guesses.take(kept)


def score(teacher: Path, images: Path, output: Path) -> Guesses:
    """Through the exported and verified model, as in production; unreadable images are left out."""
    if not output.exists():
        model, unfinished = teacher / "export" / "model.onnx", output.with_name(f"unfinished-{output.name}")
        if not is_exported(teacher):
            run_program("export/main.py", "--run", teacher)
        # Ended by an outage, it leaves scores with gaps, which the next call fills.
        run_program(
            "serve/main.py", "--model", model, "--images", images, "--output", unfinished, "--resume"
        )
        unfinished.replace(output)
        unfinished.with_name(f"{unfinished.name}.json").unlink(missing_ok=True)
    return read_guesses(output, images)


def is_exported(run: Path) -> bool:
    """Whether model.onnx is there, verified and of the best checkpoint. Exporting anew would delete the
    quantised files beside it, its embeddings and what else it was verified on."""
    export, checkpoint = run / "export", best_checkpoint(run)
    try:
        record = json.loads((export / "verification.json").read_text(encoding="utf-8"))
        digests = [record[key] for key in ("checkpoint_sha256", "model_sha256")]
        same = digests == [file_sha256(file) for file in (checkpoint, export / "model.onnx")]
        return same and record["passed"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_guesses(path: Path, images: Path) -> Guesses:
    """serve/main.py's CSV; rows with an error are left out."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        names = [column for column in reader.fieldnames or () if column.startswith(SOFT_COLUMN)]
        rows = [row for row in reader if not row["error"]]
    return Guesses(
        [str(images.resolve() / row["path"]) for row in rows],
        np.array([[float(row[name]) for name in names] for row in rows]).reshape(len(rows), len(names)),
        tuple(name.removeprefix(SOFT_COLUMN) for name in names),
    )


def select(guesses: Guesses, threshold: float, balance: bool) -> Guesses:
    """The confident ones, most confident first in each class.

    Raises:
        UserError: there are none, or some class has none and all are to have equally many.
    """
    confidence, labels = guesses.probabilities.max(axis=1), guesses.labels
    by_class = []
    for label in range(len(guesses.class_names)):
        members = np.flatnonzero((labels == label) & (confidence >= threshold))
        by_class.append(members[np.argsort(-confidence[members], kind="stable")])
    absent = [name for name, members in zip(guesses.class_names, by_class, strict=True) if not len(members)]
    if absent:
        missing = (
            f"no unlabelled image is {', '.join(absent[:10])}{', ...' if absent[10:] else ''} with a "
            f"probability of {threshold:g}"
        )
        if balance or len(absent) == len(by_class):
            raise UserError(
                f"{missing}: lower --threshold, add such images to --unlabelled or train the teacher better"
                f"{', or leave out --balance' if balance else ''}"
            )
        print(f"warning: {missing}: the student has labelled ones only", file=sys.stderr)
    if balance:
        smallest = min(map(len, by_class))
        by_class = [members[:smallest] for members in by_class]
    return guesses.take(np.concatenate(by_class))


if __name__ == "__main__":
    end_on_signal("; the same command continues with what is not finished")
    sys.exit(main())

"""Score a folder of images with an exported model. Needs onnxruntime, numpy and Pillow only.

python serve/main.py --model model.onnx --images DIR --output predictions.csv
"""

import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not serve/, belongs on sys.path
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence

import PIL

from serve.accelerators import ALL_PRECISIONS, PROVIDERS
from serve.batch import Row, atomic_writer, check_kaggle, score, write_csv, write_kaggle
from serve.metadata import ModelMetadata
from serve.predictor import Predictor
from serve.preprocess import Listing, list_images
from serve.processors import available_processors

PROGRESS_SECONDS = 5.0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="ONNX file written by export/main.py")
    add("--images", type=Path, required=True, help="folder (searched recursively) or one image")
    add("--output", type=Path, default=Path("predictions.csv"), help="default: %(default)s")
    add("--format", choices=("csv", "kaggle"), default="csv", help="default: %(default)s")
    add("--labels", action="store_true", help="kaggle: class number instead of probability")
    add("--provider", choices=("auto", *PROVIDERS), default="auto", help="default: %(default)s")
    add("--precision", choices=ALL_PRECISIONS, default="fp32", help="of the provider; default: %(default)s")
    add("--allow-unverified", action="store_true", help="use a provider that the model was not verified on")
    add("--device-id", type=int, default=0, help="which GPU; default: %(default)s")
    add("--engine-cache", type=Path, help="TensorRT's engines; default: ~/.cache/purebred/tensorrt")
    add("--batch-size", type=int, default=32, help="images for one call; default: %(default)s")
    add("--threads", type=int, default=0, help="inference threads; 0: one a processor")
    add("--decode-threads", type=int, default=0, help="0: one a processor")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 scored, 1 not one image could be scored, 2 unusable arguments."""
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    root, listing = find_images(args.images)
    predictor = Predictor(
        args.model,
        args.provider,
        args.threads,
        args.precision,
        device_id=args.device_id,
        engine_cache=args.engine_cache,
        allow_unverified=args.allow_unverified,
    )
    if args.labels and args.format != "kaggle":
        raise ValueError("--labels goes with --format kaggle; csv has a label column anyway")
    if args.format == "kaggle":
        check_kaggle(listing.paths, predictor.num_classes, args.labels)
    if not args.output.absolute().parent.is_dir():
        raise ValueError(f"the folder of --output {str(args.output)!r} does not exist; make it first")
    if args.output.exists() and not args.output.is_file():  # replaced at the end, so found out too late
        raise ValueError(f"--output {str(args.output)!r} is not a regular file")
    print(
        f"scoring {len(listing.paths)} images in {root} with {args.model} "
        f"({', '.join(predictor.metadata.class_names)}) on the {predictor.provider} provider "
        f"at {predictor.precision}, {predictor.share}"
        + (f" (auto: {predictor.reason})" if predictor.reason else ""),
        file=sys.stderr,
    )

    if warning := resampling_warning(predictor.metadata):
        print(warning, file=sys.stderr)

    started = time.perf_counter()
    threads = args.decode_threads or available_processors()
    rows = score(predictor, root, listing.paths, args.batch_size, threads)
    with atomic_writer(args.output) as file:
        if args.format == "kaggle":
            written = write_kaggle(file, rows, args.labels)
        else:
            rows = merge_problems(rows, listing)
            written = write_csv(file, rows, predictor.metadata.class_names)
        total, errors = count_rows(written, len(listing.paths))
    seconds = time.perf_counter() - started

    expected = len(listing.paths) + (len(listing.problems) if args.format == "csv" else 0)
    assert total == expected, f"{total} rows for {expected} inputs"
    scored = total - errors
    print(
        f"{total} rows in {args.output}: {scored} scored, {errors} errors; "
        f"{seconds:.1f} s, {scored / seconds:.0f} images/s"
    )
    for name, problem in listing.problems.items():
        print(f"warning: {name!r}: {problem}", file=sys.stderr)
    if listing.ignored:
        print(f"ignored {listing.ignored} files without an image suffix", file=sys.stderr)
    return 0 if scored else 1


def find_images(images: Path) -> tuple[Path, Listing]:
    """(root, what to score below it). Raises ValueError when there is nothing."""
    if images.is_file():
        return images.parent, Listing([images.name], {}, 0)
    if not images.is_dir():
        raise ValueError(f"--images {str(images)!r} does not exist")
    listing = list_images(images)
    if not listing.paths:
        raise ValueError(
            f"no images in {str(images)!r}: {listing.ignored} other files, "
            f"{len(listing.problems)} folders not entered {sorted(listing.problems)[:3]}"
        )
    return images, listing


def resampling_warning(metadata: ModelMetadata) -> str:
    """Pillow's resampling has changed between major versions; "" when the verified one is in use."""
    verified = metadata.versions.get("pillow", PIL.__version__)
    if verified.partition(".")[0] == PIL.__version__.partition(".")[0]:
        return ""
    return (
        f"warning: this model was verified with Pillow {verified}, this is {PIL.__version__}: "
        "resized pixels can differ a little"
    )


def merge_problems(rows: Iterable[Row], listing: Listing) -> Iterator[Row]:
    """Error rows for the folders that were not entered, each at its place in the sorted order."""
    problems = sorted(listing.problems.items(), reverse=True)
    for row in rows:
        while problems and problems[-1][0] < row.path:
            name, problem = problems.pop()
            yield Row(name, error=problem)
        yield row
    yield from (Row(name, error=problem) for name, problem in reversed(problems))


def count_rows(rows: Iterable[Row], num_images: int) -> tuple[int, int]:
    """Drain the rows, reporting progress: (rows, rows with an error)."""
    total = errors = 0
    reported = started = time.perf_counter()
    for row in rows:
        total += 1
        errors += bool(row.error)
        now = time.perf_counter()
        if now - reported >= PROGRESS_SECONDS:
            rate = total / (now - started)
            left = (num_images - total) / rate
            print(f"{total}/{num_images} {rate:.0f} images/s {left:.0f} s left", file=sys.stderr)
            reported = now
    return total, errors


if __name__ == "__main__":
    sys.exit(main())

"""Score images with an exported model. Needs onnxruntime, numpy and Pillow only.

python serve/main.py --model model.onnx --images DIR --output predictions.csv
python serve/main.py --model model.onnx --images 'shards/{000..099}.tar' --shard 3/8 --output predictions/
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports that take longest
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, not serve/
    from serve.contract.interrupts import end_on_signal

    end_on_signal(importing=True)

import argparse
import io
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from serve.arguments import build_parser, check_options
from serve.batch import check_score, default_batch_size
from serve.contract.errors import UserError, print_line
from serve.contract.files import atomic_write
from serve.contract.images import memory_note
from serve.contract.urls import is_remote, redact
from serve.inputs.sources import Source, open_source
from serve.job import PartWriter, Scoring, earlier_manifest
from serve.local_copy import LocalCopy, OpenedModel, resolve_model
from serve.outcome import Write, open_summary, outcome_code, print_outcome, report_error
from serve.outputs.destination import check_output_replaceable, open_output
from serve.outputs.formats import FORMATS, format_of
from serve.outputs.layout import Format, Layout
from serve.predictor import Predictor
from serve.processors import available_processors
from serve.progress import Progress, print_start
from serve.providers.registry import PROVIDERS, why_absent
from serve.shards import Manifest, Shard
from serve.verification import read_metadata

if TYPE_CHECKING:
    from serve.outputs.sample import Sample


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code.

    0: every input has its row, and some were scored (with --shard: every input of the shard has its row).
    1: every input has its row, and not one image could be scored. 2: unusable arguments, model or inputs:
    the same call will fail again. 3: the system failed (storage, network, a full disk): the same call may
    succeed. 4: every input has its row, and more of them are errors than --max-errors allows (with --shard:
    so many of this shard that the whole job has too many).
    """
    args = build_parser(__doc__).parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name must not fail a job that is done
    try:
        return run(args)
    except MemoryError as error:
        print_line(f"error: {error or 'out of memory'}: lower --batch-size or --workers")
        return 2
    except (UserError, OSError) as error:
        return report_error(error)


def run(args: argparse.Namespace) -> int:
    shard = Shard.parse(args.shard) if args.shard else None
    form = FORMATS[args.format or "csv"] if args.format or shard else format_of(args.output)
    check_options(args, form, shard)
    sample = None
    if args.sample_submission:
        from serve.outputs.sample import read_sample  # what only contests need does not slow every start

        sample = read_sample(args.sample_submission)
    with open_output(args.output, form.suffix, shard) as (path, copy):
        output = copy.url_of(path)
        part = Path(os.path.realpath(path))  # a link is written through
        inputs = {
            "--images": args.images,
            "--model": args.model,
            "--sample-submission": args.sample_submission,
        }
        for flag, given in inputs.items():
            check_replaces_no_input(flag, given, output, part)
        check_output_replaceable(copy, part, args.overwrite, keep_manifest=bool(shard or args.resume))
        with (
            open_summary(args.summary, output, shard, args.overwrite) as write_summary,
            resolve_model(args.model) as model,
        ):
            check_replaces_no_input("--model", model.location, output, part)
            return score_images(args, model, shard, form, sample, part, copy, output, write_summary)


def score_images(
    args: argparse.Namespace,
    model: OpenedModel,
    shard: Shard | None,
    form: Format,
    sample: "Sample | None",
    part: Path,
    copy: LocalCopy,
    output: str,
    write_summary: Write,
) -> int:
    server = None
    if args.track:
        from serve.tracking import find_server  # what only a tracked call needs does not slow every start

        server = find_server(model.location)
    started = time.time()
    source = open_source(args.images)
    if args.resume and args.provider == "auto":
        keep_choices(args, model.path, earlier_manifest(part, copy, model.path))
    scoring = open_scoring(args, model, form, sample, source)
    source = scoring.source
    total = len(source.inventory)
    rows = shard.rows(total, scoring.batch_size) if shard else range(total)
    which = (
        f"shard {shard.index} of {shard.count}, {len(rows)} of {total} images"
        if shard
        else f"{total} images"
    )
    print_start(f"{which} in {args.images}", model.described(args.model), scoring.predictor, source)
    if not sample and (warning := scoring.layout.warn_of_size(len(rows))):
        print_line(warning)
    facts = scoring.facts() if args.summary or server else {}  # of the model as it is now
    progress = Progress(len(rows))
    if shard or args.resume or (total > args.part_size and scoring.form.open_joiner):
        part.parent.mkdir(exist_ok=True)
        writer = PartWriter(scoring, part, rows, progress, copy)
        writer.write(args.part_size, args.resume, keep_manifest=bool(shard or args.resume))
    else:
        with atomic_write(part) as file:
            scoring.write(rows, file, progress)
        copy.publish(part)
    progress.print_end(output, source)
    summary = progress.summary
    print_outcome(summary)
    if args.summary:
        summary.facts = {**facts, "output": redact(output), "shard": args.shard}
        write_summary(summary)
    if server:
        from serve.scoring_run import describe_run, log_run

        log_run(server, describe_run(args, model, scoring, progress, shard, output, started))
    if summary.is_outage:
        raise OSError(
            f"{summary.transient} of {summary.rows} inputs could not be read for reasons that may pass; "
            + ("the same call" if sample else "they have error rows, and the same call with --resume")
            + " tries them again"
        )
    if code := outcome_code(summary, total, args.max_errors):
        return code
    # The images of one small shard may well be all broken: merge.py judges the whole job.
    return 0 if shard or summary.scored else 1


def check_replaces_no_input(flag: str, given: str, output: str, part: Path) -> None:
    if output == given if is_remote(given) else os.path.realpath(given) == str(part):
        raise UserError(f"--output {output!r} would replace {flag}: choose another name")


def keep_choices(args: argparse.Namespace, model: Path, earlier: Manifest | None) -> None:
    """Let auto choose as in the call that this one resumes: batches of another size would be another job,
    and the model may have been verified on a faster provider since."""
    if earlier is None or earlier.job.settings.get("precision") != args.precision:
        return
    if args.batch_size is None:
        args.batch_size = earlier.job.settings["batch_size"]
    provider = earlier.made_with.get("provider", "")
    usable = provider in PROVIDERS and not why_absent(provider)
    if usable and (args.allow_unverified or read_metadata(model).is_verified(provider, args.precision)):
        args.provider = provider


def open_scoring(
    args: argparse.Namespace, model: OpenedModel, form: Format, sample: "Sample | None", source: Source
) -> Scoring:
    predictor = Predictor(
        model.path,
        args.provider,
        args.threads,
        args.precision,
        device_id=args.device_id,
        engine_cache=args.engine_cache,
        allow_unverified=args.allow_unverified,
        workers=args.workers or available_processors(),
    )
    batch_size = args.batch_size
    if batch_size is None:
        batch_size = default_batch_size(predictor)
    class_names = predictor.metadata.class_names
    layout = Layout(class_names, args.top_k, args.embeddings)
    if sample:
        from serve.outputs.submission import make_submission

        submission = make_submission(sample, class_names, args.submission_values, source.inventory)
        submission.print_start()
        source, form = replace(source, inventory=submission.inventory), submission.form
    check_score(predictor, batch_size, args.workers, args.image_timeout, args.embeddings)
    if note := memory_note(args.max_megapixels, available_processors()):
        print_line(note)
    named = {
        "model": redact(model.location),
        "model_version": model.version,
        "images": redact(args.images),
        "max_errors": args.max_errors,
    }
    return Scoring(
        predictor,
        source,
        form,
        layout,
        batch_size,
        args.workers,
        args.image_timeout,
        args.max_megapixels,
        named,
    )


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())

#!/usr/bin/env python3
"""Run the Jobs of an overlay for one run, in order; stop at the first that fails.

k8s/pipeline.py cpu --run first sample train export score merge
k8s/pipeline.py gpu --run second --set DATA=/data/photographs --settings train.yaml

Each Job has the run's name (train-first) and settings of its own: several runs can be in one namespace.
A finished Job is deleted and made again: training and scoring continue with what the run has. Without
steps: train export verify score merge; verify is left out where scoring is on the CPU in float32, which
export has verified.

Exit codes: 0 all complete; 1 a Job failed, or was deleted or replaced by somebody else; 2 unusable
arguments, or refused; 3 a step has not ended within --timeout, and was suspended, or a server does not
answer; 130, 143 interrupted, the Job continues.
"""

import argparse
import signal
import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not k8s/, belongs on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from k8s.runner.checks import check
from k8s.runner.cluster import Cluster, KubectlError, PipelineError, say
from k8s.runner.job import Job, follow, path_of, refuse_active, start, wait
from k8s.runner.render import Rendered, as_yaml, find_overlay, render

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM."""


def duration(text: str) -> float:
    """Return seconds of a number with s, m, h or d, or without a unit."""
    number, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1)
    if not number.isdecimal() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: 90s, 30m, 12h or 2d")
    return float(int(number) * unit)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="k8s/pipeline.py",
        usage="k8s/pipeline.py OVERLAY --run NAME [options] [STEP ...]",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("overlay", metavar="OVERLAY", help="folder in k8s/overlays, or the path of one of yours")
    add(
        "steps",
        metavar="STEP",
        nargs="*",
        help="steps of the overlay, in the order to run them in",
    )
    add("--run", metavar="NAME", required=True, help="the run's folder, and the end of the Jobs' names")
    add(
        *("--set", "-s"),
        metavar="KEY=VALUE",
        dest="values",
        action="append",
        default=[],
        help="a value of the overlay's ConfigMap pipeline, such as DATA or IMAGES; may be given again",
    )
    add(
        "--settings",
        metavar="FILE",
        type=Path,
        help="train/main.py's, in place of the overlay's train.yaml",
    )
    add("--namespace", "-n", metavar="NAME", help="in place of the overlay's or the current context's")
    active = parser.add_mutually_exclusive_group()
    active.add_argument(
        "--attach",
        action="store_true",
        help="wait for Jobs of this run that are active, keep those that are complete",
    )
    active.add_argument("--replace", action="store_true", help="delete an active Job and start another")
    add(
        "--timeout",
        metavar="TIME",
        type=duration,
        default=86400.0,
        help="for each step: 90s, 12h; 1d",
    )
    add("--dry-run", action="store_true", help="print what would be made; needs no cluster")
    return parser


def choose_steps(rendered: Rendered, asked: list[str]) -> list[str]:
    """Return the steps to run; a model is scored on the provider that it was verified on."""
    if not asked:
        verified = (rendered.values.get("PROVIDER"), rendered.values.get("PRECISION")) == ("cpu", "fp32")
        asked = ["train", "export", *([] if verified else ["verify"]), "score", "merge"]
    for step in asked:
        if step not in rendered.steps:
            known = ", ".join(sorted(rendered.steps))
            raise PipelineError(2, f"{rendered.overlay} has no step {step}, but {known}")
        if asked.count(step) > 1:
            raise PipelineError(2, f"the step {step} is given twice")
    return asked


def run(arguments: argparse.Namespace, rendered: Rendered, steps: list[str]) -> None:
    cluster = Cluster(arguments.namespace or rendered.namespace)
    check(cluster, rendered, steps)
    attach = arguments.attach
    for step in steps:  # all, before the first one starts
        refuse_active(cluster, rendered, step, arguments.replace, attach)
    job: Job | None = None
    try:
        for step in steps:
            job = None
            job = start(cluster, rendered, step, arguments.replace, attach)
            attach = job.attached and attach  # what follows a new Job is made anew
            wait(cluster, job, arguments.timeout)
    except Stopped:
        path = job.path if job else path_of(rendered.steps[step])
        say(f"interrupted: {path} continues" + ("" if job else ", if it was made in this moment"))
        say(f"  to follow it: {follow(cluster, rendered.steps[step])}")
        say(f"  to stop it: {cluster.command('delete', path)}")
        say("  to wait for it and run what follows: this command with --attach")
        raise


def interrupt(number: int, _: object) -> None:
    raise Stopped(number)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code."""
    given = build_parser().parse_intermixed_args(arguments)
    try:
        rendered = render(
            find_overlay(given.overlay), given.run, given.values, given.settings, given.namespace
        )
        steps = choose_steps(rendered, given.steps)
        if given.dry_run:
            made = [
                document for step in steps for document in [*rendered.beside(step), rendered.steps[step]]
            ]
            print(as_yaml([d for i, d in enumerate(made) if d not in made[:i]]), end="")
        else:
            run(given, rendered, steps)
    except Stopped as stopped:
        return 128 + int(stopped.args[0])
    except (PipelineError, KubectlError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)
    sys.exit(main())

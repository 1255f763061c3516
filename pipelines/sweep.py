"""Search settings with Optuna; every trial is a real training run.

    python pipelines/sweep.py --trials 20 --study pets --data DIR -- --epochs 10 --image-size 112

What follows `--` are flags of train/main.py, the same for all trials. Trials are kept in runs/pets/ as runs
pets-0, pets-1, ... with study.csv and figures beside them, and in MLflow as children of one run `pets`.
A trial is judged by --best-by at its best epoch, and ended early when it is worse than the median of the
trials before it at the same epoch. The same command resumes a study that was interrupted.

Exit code: 0 done; 1 three trials in a row failed alike, or none succeeded; 2 unusable arguments or files;
143 stopped by a signal.
"""

import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not pipelines/, belongs on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from serve.contract.command_line import CommandLine, Number
from serve.contract.errors import UserError
from serve.contract.installation import require

require("train", "torch", "optuna")

from serve.contract.interrupts import end_on_signal
from train.signals import EXIT_CODE, ignore_broken_pipes, stops

if __name__ == "__main__":  # before the imports that take seconds
    end_on_signal(importing=True, code=EXIT_CODE)

import argparse
import math
import os
import re
import signal
from collections.abc import Sequence
from itertools import product
from types import FrameType
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from pipelines.launch import program_command, split_flags
from pipelines.space import AUGMENTATION, Space, flags, read_space, values
from pipelines.study import (
    ParentRun,
    Plan,
    ended_trials,
    has_checkpoint,
    locked,
    open_study,
    recover,
    sampler,
)
from pipelines.study_report import STATES, check_folder, study_table, write_study_report
from pipelines.trial import run_trial
from serve.contract.mlflow_tags import KIND_TAG
from serve.contract.urls import is_remote, redact
from train.cli import given_values, parse_config, parse_unchecked
from train.config import TrainConfig
from train.engine.checks import check_batch_size, check_network
from train.engine.prepare import resolve_defaults
from train.settings import refuse_given
from train.tracking.run_record import child_environment

FAILURES_ALIKE = 3  # in a row: the fourth would fail too


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine(
        "pipelines/sweep.py", __doc__, "--trials N --study NAME --data DIR [options] [-- TRAINING FLAGS]"
    )
    add = parser.add_argument
    add(
        "--trials",
        type=Number(int, 1),
        required=True,
        help="in all, with those of this study's earlier sweeps",
    )
    add("--study", required=True, help="name of the study, of its folder and of its MLflow run")
    add("--data", default="", help="--data of train/main.py")
    add("--space", type=Path, help="YAML of the space: NAME: {low, high, log} or {choices}")
    add("--storage", default="", help="Optuna's (default: sqlite:///runs/STUDY/study.db)")
    add("--nproc_per_node", type=Number(int, 1), default=1, help="processes of each trial")
    add("--startup", type=Number(int, 1), default=5, help="random trials before any is ended early")
    add("--overwrite", action="store_true", help="replace reports of other origin in the study's folder")
    add(
        "--prune-after",
        type=Number(int, 1),
        help="epochs before a trial is ended early (default: a third)",
    )
    return parser


def parse_plan(argv: Sequence[str]) -> Plan:
    """Return the plan of a command line, after every check that is possible before the first trial.

    Raises:
        UserError: an unusable flag, space, model or number of processes.
    """
    own, rest = split_flags(argv)
    args = build_parser().parse_args(own)
    refuse_given(parse_unchecked(rest), ["name", *(["data"] if args.data else [])], "the sweep, after `--`")
    if args.data:
        rest = [f"--data={args.data}", *rest]
    config = parse_config([*rest, f"--name={args.study}"])
    if not args.study:
        raise UserError("--study needs a name")
    if config.data and not is_remote(config.data) and not Path(config.data).exists():
        raise UserError(f"--data {config.data!r} does not exist")
    if is_remote(config.output):
        raise UserError(f"--output {config.output}: a study needs a local folder; copy it afterwards")
    space = read_space(args.space, rest)
    check_batches(config, space, rest, args.nproc_per_node)
    check_models(config, space, is_default=args.space is None)
    folder = Path(config.output) / args.study
    check_folder(folder, args.overwrite)
    return Plan(
        study=args.study,
        trials=args.trials,
        folder=folder,
        storage=args.storage or f"sqlite:///{folder}/study.db",
        processes=args.nproc_per_node,
        startup=args.startup,
        prune_after=math.ceil(config.epochs / 3) if args.prune_after is None else args.prune_after,
        argv=rest,
        config=config,
        space=space,
    )


def check_batches(config: TrainConfig, space: Space, argv: Sequence[str], processes: int) -> None:
    """Raise UserError when a batch cannot be divided among processes, or into the pairs of mixing."""
    augmented = AUGMENTATION in space and "mixup" not in given_values(argv)
    mixes = augmented or config.mixup + config.cutmix > 0 or bool({"mixup", "cutmix"} & space.keys())
    names = ("batch_size", "accumulation")
    tried = [values(space[name]) if name in space else [getattr(config, name)] for name in names]
    for batch_size, accumulation in product(*tried):
        changes = {"batch_size": batch_size, "accumulation": accumulation}
        check_batch_size(config.replace(**changes, mixup=1.0 if mixes else 0.0), processes)


def check_models(config: TrainConfig, space: Space, is_default: bool) -> None:
    """Raise UserError when a model that may be tried cannot be built with these settings."""
    models = values(space["model"]) if "model" in space else [config.model]
    for model in models:
        try:
            resolved, _ = resolve_defaults(config.replace(model=model))
            check_network(resolved)
        except ValueError as error:
            if is_default and "model" in space:
                advice = f"the default space has {', '.join(models)}: give --model after `--`, or --space"
                raise UserError(f"{error} ({advice})") from error
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for number in stops():
        signal.signal(number, interrupt)
    try:
        plan = parse_plan(sys.argv[1:] if argv is None else argv)
        plan.folder.mkdir(parents=True, exist_ok=True)
        with locked(plan.folder) as lock:
            return run(plan, lock)
    except (UserError, OSError) as error:
        print(f"error: {redact(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command resumes the study", file=sys.stderr)
        return EXIT_CODE


def interrupt(signum: int, frame: FrameType | None) -> None:
    for number in stops():  # the trial is stopped in order, whatever signal comes now
        signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt


def run(plan: Plan, lock: Sequence[int]) -> int:
    """Run trials until there are as many as planned; return the exit code."""
    study = open_study(plan)
    recover(study, plan)
    parent = ParentRun(plan, study)
    errors: list[str] = []  # of the last trials in a row
    status = "FAILED"
    try:
        while len(ended_trials(study)) < plan.trials:
            parent.send()
            trial = run_one(plan, study, parent.run_id, lock)
            print(outcome(plan, study, trial), flush=True)
            write_study_report(plan, study)
            errors = [*errors, trial.user_attrs["error"]] if trial.state == TrialState.FAIL else []
            alike = {re.sub(r"\d+", "#", error) for error in errors[-FAILURES_ALIKE:]}
            if len(errors) >= FAILURES_ALIKE and len(alike) == 1:
                reason = f"{FAILURES_ALIKE} trials in a row failed: {errors[-1]}"
                log = plan.folder / f"{trial.user_attrs['run']}.log"
                print(f"error: {reason} (see {log})", file=sys.stderr)
                return 1
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        recover(study, plan)
        raise
    finally:
        files = write_study_report(plan, study)
        parent.send(files, status)
    print(study_table(plan, study))
    print(f"written: {', '.join(str(file) for file in files)}")
    if not any(trial.state == TrialState.COMPLETE for trial in study.trials):
        print("error: no trial succeeded", file=sys.stderr)
        return 1
    return 0


def run_one(plan: Plan, study: optuna.Study, parent: str, lock: Sequence[int]) -> FrozenTrial:
    """Train the next trial, and store its outcome in the study."""
    study.sampler = sampler(plan, len(study.get_trials(deepcopy=False)))
    trial = study.ask(plan.space)
    name = trial.user_attrs.get("run", f"{plan.study}-{trial.number}")
    trial.set_user_attr("run", name)
    parameters = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
    print(f"trial {trial.number}: {', '.join(parameters)}", flush=True)
    folder = plan.folder / name
    if "continues" in trial.user_attrs and has_checkpoint(folder):
        arguments = [f"--resume={folder}"]
    else:
        sampled = flags(trial.params, plan.argv)
        arguments = [*plan.argv, *sampled, f"--output={plan.folder}", f"--name={name}"]
    metrics: dict[int, float] = {}

    def on_epoch(row: dict[str, Any]) -> bool:
        epoch, value = int(row["epoch"]), float(row.get(plan.metric, math.nan))  # not each is validated
        if not math.isfinite(value):
            return False
        metrics[epoch] = value
        trial.report(value, epoch)
        last = plan.config.epochs + plan.config.retune_epochs
        return plan.prune_after <= epoch < last and trial.should_prune()

    tags = {KIND_TAG: "trial", "sweep.study": plan.study, "sweep.trial": str(trial.number)}
    end = run_trial(
        program_command("train/main.py", *arguments, processes=plan.processes),
        plan.folder / f"{name}.log",
        os.environ | child_environment(parent, tags),
        folder / "metrics.jsonl",
        on_epoch,
        lock,
    )
    trial.set_user_attr("epochs", max(metrics, default=0))
    if metrics:
        best = max(metrics, key=lambda epoch: plan.sign * metrics[epoch])
        trial.set_user_attr("best_epoch", best)
        trial.set_user_attr("best", metrics[best])
    if end.stopped:
        return study.tell(trial, state=TrialState.PRUNED)
    if end.error or not metrics:
        trial.set_user_attr("error", end.error or f"no epoch has a finite {plan.metric}")
        return study.tell(trial, state=TrialState.FAIL)
    return study.tell(trial, metrics[best])


def outcome(plan: Plan, study: optuna.Study, trial: FrozenTrial) -> str:
    """Return a line on how a trial ended."""
    attributes, done = trial.user_attrs, f"{len(ended_trials(study))}/{plan.trials} done"
    if trial.state == TrialState.FAIL:
        return f"  {STATES[trial.state]}: {attributes['error']} ({done})"
    best = f"{plan.metric} {attributes['best']:.4f} at epoch {attributes['best_epoch']}"
    return f"  {STATES[trial.state]} after epoch {attributes['epochs']}: {best} ({done})"


if __name__ == "__main__":
    ignore_broken_pipes()
    sys.exit(main())

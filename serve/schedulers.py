"""The position of this task in a job array, from the variables that the cluster's scheduler sets."""

import os
from dataclasses import dataclass

from serve.contract.errors import UserError


@dataclass(frozen=True)
class Scheduler:
    """Names of environment variables; "": the scheduler has no such variable."""

    name: str
    index: str
    """Number of this task."""
    count: str = ""
    """How many tasks the array has."""
    first: str = ""
    last: str = ""
    """Numbers of the first and the last task, where they need not be 0 and count - 1."""


SCHEDULERS = (
    Scheduler("Kubernetes", "JOB_COMPLETION_INDEX"),
    Scheduler("AWS Batch", "AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    Scheduler("Google Batch", "BATCH_TASK_INDEX", "BATCH_TASK_COUNT"),
    Scheduler("Cloud Run", "CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT"),
    Scheduler(
        "SLURM",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_COUNT",
        "SLURM_ARRAY_TASK_MIN",
        "SLURM_ARRAY_TASK_MAX",
    ),
)


def array_task(expected: int | None = None) -> tuple[int, int]:
    """Return this task's position, from 0, and the number of tasks.

    Args:
        expected: the number of tasks, for a scheduler that does not give it; one that does must agree.

    Raises:
        UserError: not a task of an array, one of several schedulers at once, an array of another size, or
            numbers without a constant step.
    """
    found = [scheduler for scheduler in SCHEDULERS if os.environ.get(scheduler.index)]
    if not found:
        names = ", ".join(f"{scheduler.index} ({scheduler.name})" for scheduler in SCHEDULERS)
        raise UserError(f"--shard auto: none of {names} is set: give --shard I/N with I from 0 to N-1")
    if len(found) > 1:
        names = " and ".join(scheduler.index for scheduler in found)
        raise UserError(f"--shard auto: {names} are set: give --shard I/N with I from 0 to N-1")
    (scheduler,) = found
    count = _number(scheduler.count)
    if count is None and expected is None:
        missing = scheduler.count or "the number of tasks"
        raise UserError(f"--shard auto: {scheduler.name} does not set {missing}: give --shard auto/N")
    if count is not None and expected is not None and count != expected:
        raise UserError(
            f"--shard auto/{expected}: the array of {scheduler.name} has {count} tasks, not "
            f"{expected}: start the whole array again with --resume, which keeps what is finished, or give "
            f"this task's number, as in --shard ${scheduler.index}/{expected}"
        )
    size = count if count is not None else expected or 0
    return _position(scheduler, size), size


def _position(scheduler: Scheduler, count: int) -> int:
    """Return which one of the array's tasks this is: its numbers may begin anywhere, and have a step."""
    index, first, last = _number(scheduler.index), _number(scheduler.first), _number(scheduler.last)
    first = first or 0
    last = first + count - 1 if last is None else last
    step, rest = divmod(last - first, count - 1) if count > 1 else (max(1, last - first), 0)
    position, off = divmod((index or 0) - first, max(1, step))
    if rest or off or step < 1 or not 0 <= position < count:
        raise UserError(
            f"--shard auto: {scheduler.index}={index} is none of {count} numbers in equal steps, {first} "
            f"to {last}: number the tasks from 0 to {count - 1}, or give --shard I/{count}"
        )
    return position


def _number(variable: str) -> int | None:
    """Return the value of an environment variable, None where it is not set."""
    text = os.environ.get(variable, "") if variable else ""
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"--shard auto: {variable}={text} is not a number")
    return int(text)

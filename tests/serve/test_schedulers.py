"""Every scheduler's variables give each task of an array a shard of its own, and all of them together."""

import pytest

from serve.contract.errors import UserError
from serve.schedulers import SCHEDULERS, array_task
from serve.shards import Shard


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheduler in SCHEDULERS:
        for name in (scheduler.index, scheduler.count, scheduler.first, scheduler.last):
            if name:
                monkeypatch.delenv(name, raising=False)


def use(monkeypatch: pytest.MonkeyPatch, variables: dict[str, object]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def slurm(numbers: list[int], number: int) -> dict[str, object]:
    """What SLURM sets for a task of an array with these numbers."""
    return {
        "SLURM_ARRAY_TASK_ID": number,
        "SLURM_ARRAY_TASK_COUNT": len(numbers),
        "SLURM_ARRAY_TASK_MIN": min(numbers),
        "SLURM_ARRAY_TASK_MAX": max(numbers),
    }


@pytest.mark.parametrize(
    ("index", "count"),
    [
        ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
        ("BATCH_TASK_INDEX", "BATCH_TASK_COUNT"),
        ("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT"),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ],
)
def test_index_and_count_are_the_schedulers(
    monkeypatch: pytest.MonkeyPatch, index: str, count: str
) -> None:
    for number in range(3):
        use(monkeypatch, {index: number, count: 3})
        assert Shard.parse("auto") == Shard.parse("auto/3") == Shard(number, 3)
    with pytest.raises(ValueError, match="--resume"):
        Shard.parse("auto/4")
    use(monkeypatch, {index: 3})
    with pytest.raises(ValueError, match=index):
        Shard.parse("auto")
    monkeypatch.delenv(count)
    assert Shard.parse("auto/4") == Shard(3, 4)
    with pytest.raises(ValueError, match=count):
        Shard.parse("auto")


def test_kubernetes_gives_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {"JOB_COMPLETION_INDEX": 7})
    assert array_task(8) == (7, 8)
    with pytest.raises(ValueError, match="auto/N"):
        array_task()


@pytest.mark.parametrize(
    "numbers", [range(8), range(1, 9), range(0, 16, 2), range(5, 50, 11), range(3, 4), range(1, 7, 5)]
)
def test_a_slurm_array_may_begin_anywhere_and_have_a_step(
    monkeypatch: pytest.MonkeyPatch, numbers: range
) -> None:
    shards = []
    for number in numbers:
        use(monkeypatch, slurm(list(numbers), number))
        shards.append(Shard.parse("auto"))
    assert shards == [Shard(position, len(numbers)) for position in range(len(numbers))]


@pytest.mark.parametrize("numbers", [[0, 1, 3], [1, 2, 5], [0, 3, 4, 6]])
def test_no_two_tasks_of_an_uneven_array_score_the_same_shard(
    monkeypatch: pytest.MonkeyPatch, numbers: list[int]
) -> None:
    taken, refused = [], 0
    for number in numbers:
        use(monkeypatch, slurm(numbers, number))
        try:
            taken.append(Shard.parse("auto"))
        except UserError:
            refused += 1
    assert refused
    assert len(set(taken)) == len(taken)


def test_some_tasks_of_an_array_that_are_started_again_are_no_array_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, slurm([3, 5], 5))
    with pytest.raises(ValueError, match=r"--shard \$SLURM_ARRAY_TASK_ID/8"):
        Shard.parse("auto/8")


def test_what_cannot_be_decided_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--shard I/N"):
        Shard.parse("auto")
    use(monkeypatch, {"CLOUD_RUN_TASK_INDEX": "one", "CLOUD_RUN_TASK_COUNT": 2})
    with pytest.raises(ValueError, match="CLOUD_RUN_TASK_INDEX=one"):
        Shard.parse("auto")
    use(monkeypatch, {"CLOUD_RUN_TASK_INDEX": "0", "BATCH_TASK_INDEX": 0})
    with pytest.raises(ValueError, match="BATCH_TASK_INDEX and CLOUD_RUN_TASK_INDEX"):
        Shard.parse("auto")

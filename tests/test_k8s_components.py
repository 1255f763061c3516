"""Components of k8s/: all that combine are valid together, and policies open what is needed."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
from manifest_schemas import check
from manifests import combine, pods
from network_policies import connects

KINDS = ("Job", "JobSet", "TrainJob")
SEVERAL_NODES = [{"name": "pipeline", "behavior": "merge", "literals": ["NODES=2"]}]


PLACES = {"shared": (), "one-node": ("one-node/jobs",), "s3": ("s3/jobs",)}
WRAPPED = {"job": (), "jobset": ("jobset",), "kubeflow": ("kubeflow",)}
COMBINATIONS = [
    (*PLACES[place], *gpu, *WRAPPED[wrapped], *kueue, *policies, "counts")
    for place, gpu, wrapped, kueue, policies in itertools.product(
        PLACES, ((), ("gpu",)), WRAPPED, ((), ("kueue",)), ((), ("policies/jobs",))
    )
]
PLATFORMS = [
    (*mlflow, *place, *policies)
    for mlflow, place, policies in itertools.product(
        ((), ("mlflow",)),
        ((), ("one-node/platform",), ("s3/platform",)),
        ((), ("policies/platform",), ("policies/platform", "policies/stores")),
    )
]


@pytest.mark.parametrize("components", COMBINATIONS, ids="+".join)
def test_every_combination_of_components_for_jobs_is_valid(
    components: tuple[str, ...], tmp_path: Path
) -> None:
    documents = combine("jobs", components, tmp_path, configMapGenerator=SEVERAL_NODES)
    check(documents)
    training = [d for d in documents if d["metadata"]["name"] == "train" and d["kind"] in KINDS]
    kind = {"jobset": "JobSet", "kubeflow": "TrainJob"}
    assert [d["kind"] for d in training] == [next((kind[c] for c in components if c in kind), "Job")]
    for pod in pods(documents):
        claims = {
            v["persistentVolumeClaim"]["claimName"]
            for v in pod.spec["volumes"]
            if "persistentVolumeClaim" in v
        }
        assert claims == (
            set() if "s3/jobs" in components
            else {"data-one-node", "runs-one-node"} if "one-node/jobs" in components
            else {"data", "runs"}
        )  # fmt: skip
        gpus = pod.spec["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)
        step = pod.owner.partition("/")[2]
        assert gpus == ({"train": 8, "verify": 1, "score": 1}.get(step, 0) if "gpu" in components else 0)
    queued = [d for d in documents if "kueue.x-k8s.io/queue-name" in d["metadata"]["labels"]]
    assert {d["metadata"]["name"] for d in queued} == (
        {d["metadata"]["name"] for d in documents if d["kind"] in KINDS} if "kueue" in components else set()
    )


@pytest.mark.parametrize("components", PLATFORMS, ids="+".join)
def test_every_combination_of_components_for_the_platform_is_valid(
    components: tuple[str, ...], tmp_path: Path
) -> None:
    check(combine("platform", components, tmp_path))


@pytest.mark.parametrize("late", ["gpu", "one-node/jobs", "s3/jobs"])
@pytest.mark.parametrize("wrapping", ["jobset", "kubeflow"])
def test_a_component_that_would_come_too_late_to_change_training_is_an_error(
    late: str, wrapping: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="train"):
        combine("jobs", (wrapping, late), tmp_path)


# Network policies


def test_policies_open_what_is_needed_and_the_ranks_of_a_run_to_nobody_else(tmp_path: Path) -> None:
    names = ("mlflow", "policies/platform", "policies/stores")
    platform = combine("platform", names, tmp_path)
    run = {
        name: combine(
            "jobs",
            ("policies/jobs",),
            tmp_path,
            nameSuffix=f"-{name}",
            labels=[{"pairs": {"purebred/run": name}, "includeSelectors": True}],
        )
        for name in ("aa", "bb")
    }
    everything = [*platform, *run["aa"], *run["bb"]]
    there = {pod.owner: pod.labels for pod in pods(everything)}
    train, other, export = (there[f"Job/{name}"] for name in ("train-aa", "train-bb", "export-aa"))
    server, database = there["Deployment/mlflow"], there["StatefulSet/mlflow-database"]

    def reaches(source: Mapping[str, str], target: Mapping[str, str] | str, port: int | str) -> bool:
        return connects(everything, source, target, port)

    assert reaches(train, train, 40000)  # gloo and nccl choose their ports
    for stranger in (other, export, server, {}):
        assert not reaches(stranger, train, 29400)
    assert all(reaches(job, server, 5000) for job in (train, export))
    assert not reaches({}, server, 5000)
    assert reaches(server, database, 5432)
    assert not reaches(train, database, 5432)
    assert reaches(train, "198.51.100.7", 443)
    assert not reaches(train, "198.51.100.7", 22)
    assert not reaches(server, "198.51.100.7", 443)
    without = combine("platform", names[:2], tmp_path)
    assert not connects([*without, *run["aa"]], train, "198.51.100.7", 443)
    assert all(connects(without, pod, "169.254.20.10", 53) for pod in (train, server, database))

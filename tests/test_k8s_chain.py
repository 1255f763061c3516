"""components/chain: the overlay's own Jobs in one JobSet, in order, and when it starts again."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import forked
import kubernetes_validate
import pytest
from conftest import SMALL, TrainedRun, copy_of
from kubeflow_trainer_api import models
from manifests import (
    K8S,
    Manifest,
    combine,
    config,
    expand,
    pods,
    refusals,
    render_folder,
    restricted,
)
from test_k8s_arguments import parse_torchrun, parsers

from serve.contract.files import file_sha256

STEPS = ["train", "export", "verify", "score", "merge"]
EXAMPLE = K8S / "examples" / "chain"
LOST = "lost"  # a pod whose node is gone, or that was evicted


def chain_of(documents: list[Manifest]) -> Manifest:
    (chain,) = (document for document in documents if document["kind"] == "JobSet")
    return chain


def job_of(chain: Manifest, step: str) -> Manifest:
    (job,) = (job for job in chain["spec"]["replicatedJobs"] if job["name"] == step)
    spec: Manifest = job["template"]["spec"]
    return spec


@pytest.fixture
def chain() -> Manifest:
    return deepcopy(chain_of(render_folder(EXAMPLE)))


def test_the_set_fits_jobsets_own_models_and_no_field_is_dropped(chain: Manifest) -> None:
    assert models.JobsetV1alpha2JobSet.from_dict(chain).to_dict() == chain
    assert refusals(chain) == []


@pytest.mark.parametrize("version", ["1.36", "1.37"])
def test_each_of_its_jobs_is_one_that_an_api_server_accepts(chain: Manifest, version: str) -> None:
    for step in STEPS:
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": step},
            "spec": job_of(chain, step),
        }
        assert kubernetes_validate.validate(job, version, strict=True) == version
        assert (refusals(job), restricted(job["spec"]["template"]["spec"])) == ([], [])


def test_its_jobs_are_those_of_the_overlay_and_run_one_after_the_other(chain: Manifest) -> None:
    own = {
        d["metadata"]["name"]: d["spec"]
        for d in render_folder(K8S / "overlays/cpu/jobs")
        if d["kind"] == "Job"
    }
    assert [job["name"] for job in chain["spec"]["replicatedJobs"]] == STEPS
    for before, job in zip([None, *STEPS], chain["spec"]["replicatedJobs"], strict=False):
        assert job.get("dependsOn", []) == ([{"name": before, "status": "Complete"}] if before else [])
        mine, theirs = job["template"]["spec"]["template"]["spec"], own[job["name"]]["template"]["spec"]
        assert mine["containers"][0]["args"] == theirs["containers"][0]["args"]
        assert mine["volumes"] == theirs["volumes"]
    for step in STEPS[1:]:
        assert job_of(chain, step) == {k: v for k, v in own[step].items() if k != "ttlSecondsAfterFinished"}


def test_nothing_runs_twice() -> None:
    """The five Jobs, and the Service that a JobSet makes itself, are not made beside the set."""
    left = {(d["kind"], d["metadata"]["name"]) for d in render_folder(EXAMPLE)} - {("JobSet", "chain")}
    assert {name for kind, name in left if kind == "Job"} == {"sample", "sync"}
    assert {kind for kind, _ in left} == {"Job", "ConfigMap", "NetworkPolicy"}


# What happens when a pod fails


def reason(job: Manifest, code: int | str) -> str | None:
    """Reason of a Job's failure, as its controller gives it; None: the pod is replaced."""
    for rule in job.get("podFailurePolicy", {}).get("rules", []):
        if (code == LOST) if "onPodConditions" in rule else code in rule["onExitCodes"]["values"]:
            return {"FailJob": "PodFailurePolicy", "FailIndex": "FailedIndexes", "Ignore": None}[
                rule["action"]
            ]
    if "backoffLimitPerIndex" in job:
        return "FailedIndexes"
    return "BackoffLimitExceeded"


def outcome(chain: Manifest, step: str, code: int | str) -> str | None:
    """What JobSet's controller does: the first rule that fits, or else it starts the set again."""
    failed = reason(job_of(chain, step), code)
    if failed is None:
        return None
    for rule in chain["spec"]["failurePolicy"]["rules"]:
        reasons, targets = rule.get("onJobFailureReasons"), rule.get("targetReplicatedJobs")
        if (not reasons or failed in reasons) and (not targets or step in targets):
            return str(rule["action"])
    return "RestartJobSet"


def test_only_training_starts_the_set_again_and_unusable_settings_do_not(chain: Manifest) -> None:
    assert outcome(chain, "train", 1) == outcome(chain, "train", LOST) == "RestartJobSet"
    assert job_of(chain, "train")["backoffLimit"] == 0  # at once, not after the Job controller's pauses
    assert outcome(chain, "train", 2) == "FailJobSet"
    for step in STEPS[1:]:
        assert outcome(chain, step, 1) == outcome(chain, step, 2) == "FailJobSet", step
        assert outcome(chain, step, LOST) is None, step  # its Job replaces the pod


def test_no_finished_job_disappears_while_the_set_runs(chain: Manifest) -> None:
    """JobSet makes a Job again that is gone."""
    assert not [step for step in STEPS if "ttlSecondsAfterFinished" in job_of(chain, step)]
    assert chain["spec"]["ttlSecondsAfterFinished"] > 0


# With other components


def test_numbers_of_pods_reach_the_set(tmp_path: Path) -> None:
    values = {
        "name": "pipeline",
        "behavior": "merge",
        "literals": ["NODES=3", "SHARDS=5", "SHARDS_AT_ONCE=2"],
    }
    chain = chain_of(combine("jobs", ("chain", "counts"), tmp_path, configMapGenerator=[values]))
    train, score = job_of(chain, "train"), job_of(chain, "score")
    assert (train["completions"], train["parallelism"]) == (3, 3)
    assert (score["completions"], score["parallelism"]) == (5, 2)


def test_the_pods_of_a_training_on_several_nodes_meet_where_jobset_names_them(tmp_path: Path) -> None:
    """JobSet names a Job SET-STEP-0, and the Service of all pods as the set."""
    documents = combine("jobs", ("chain", "counts"), tmp_path, nameSuffix="-aa")
    chain = chain_of(documents)
    train = job_of(chain, "train")["template"]["spec"]
    labels = {v["name"]: v["valueFrom"]["fieldRef"]["fieldPath"] for v in train["containers"][0]["env"]}
    assert labels == {
        "JOB": "metadata.labels['batch.kubernetes.io/job-name']",
        "SERVICE": "metadata.labels['jobset.sigs.k8s.io/jobset-name']",
    }
    assert "subdomain" not in train  # the controller's to set
    assert chain["spec"].get("network", {}).get("enableDNSHostnames", True)


@pytest.mark.parametrize("components", [("gpu",), ("s3/jobs",), ("one-node/jobs",)], ids="+".join)
def test_it_goes_with_other_components(components: tuple[str, ...], tmp_path: Path) -> None:
    documents = combine("jobs", (*components, "chain", "kueue", "counts"), tmp_path, nameSuffix="-aa")
    chain = chain_of(documents)
    assert models.JobsetV1alpha2JobSet.from_dict(chain).to_dict() == chain
    assert refusals(chain) == []
    assert chain["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    settings = {d["metadata"]["name"] for d in documents if d["kind"] == "ConfigMap"}
    for pod in pods([chain]):
        for each in pod.containers:
            assert each["envFrom"][0]["configMapRef"]["name"] in settings


def test_every_argument_is_understood(chain: Manifest, tmp_path: Path) -> None:
    documents = render_folder(EXAMPLE)
    settings = tmp_path / "train.yaml"
    settings.write_text(config(documents, "train-settings")["train.yaml"])
    seen: dict[str, Any] = {}
    for step in STEPS:
        for each in job_of(chain, step)["template"]["spec"]["initContainers"]:
            parsers["doctor"]().parse_args(expand(each, documents)[1:])
        action, *arguments = expand(job_of(chain, step)["template"]["spec"]["containers"][0], documents)
        if action == "train":
            seen[step] = parse_torchrun(arguments, settings)[1]
        else:
            seen[step] = parsers[action]().parse_args(arguments)
    run = f"{seen['train'].output}/{seen['train'].name}"
    assert seen["train"].resume == "auto"
    assert seen["export"].run == seen["verify"].run == run
    assert seen["score"].model == f"{run}/export/model.onnx"
    assert seen["verify"].verify_provider == f"{seen['score'].provider}:{seen['score'].precision}"
    assert seen["score"].resume
    assert seen["score"].output == seen["merge"].folder


def test_steps_that_are_run_again_repeat_nothing(
    exported: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set that starts again, or that is made again, calls each command once more."""
    (tmp_path / "runs").mkdir()
    run = copy_of(exported, tmp_path, monkeypatch).rename(tmp_path / "runs" / "small")
    parts, merged = tmp_path / "predictions", tmp_path / "predictions.csv"
    settings = [*SMALL, "--epochs", 2, "--precision", "fp32", "--name", "small", "--resume", "auto"]
    model = run / "export" / "model.onnx"
    scoring = ["--model", model, "--images", exported.sample / "test", "--provider", "cpu", "--resume"]
    for part in range(2):
        forked.run("serve/main.py", *scoring, "--shard", f"{part}/2", "--output", parts, cwd=tmp_path)
    forked.run("serve/merge.py", parts, "--output", merged, cwd=tmp_path)
    kept = [*(run / "checkpoints").iterdir(), run / "metrics.jsonl", model, *parts.glob("*.csv"), merged]
    before = {file: file_sha256(file) for file in kept}
    written = {file: file.stat().st_mtime_ns for file in parts.glob("*.csv")}

    forked.train(2, "--data", exported.sample / "train", *settings, cwd=tmp_path)
    forked.run("export/main.py", "--run", run, cwd=tmp_path)
    for part in range(2):
        forked.run("serve/main.py", *scoring, "--shard", f"{part}/2", "--output", parts, cwd=tmp_path)
    forked.run("serve/merge.py", parts, "--output", merged, cwd=tmp_path)
    assert {file: file_sha256(file) for file in kept} == before
    assert {file: file.stat().st_mtime_ns for file in parts.glob("*.csv")} == written

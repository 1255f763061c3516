"""k8s/pipeline.py against a stand-in for the cluster, with kubectl's own kustomize."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kubectl_stand_in import QUEUE, StandIn
from manifests import K8S, OVERLAYS, kubectl, render_folder, render_jobs

import k8s.pipeline
import k8s.runner.checks
import k8s.runner.cluster
import k8s.runner.render
from k8s.runner.cluster import Cluster, KubectlError
from k8s.runner.reasons import Watch
from serve.providers.registry import PRECISIONS

STEPS = ("sample", "train", "export", "verify", "score", "merge")
NEVER: dict[str, Any] = {"after": 10**9, "condition": "Complete"}
DOCTOR = "doctor: /data/train is no folder"


def write_overlay(folder: Path, **values: str) -> Path:
    """Write an overlay of small Jobs that look like ours."""
    values = {
        "DATA": "/data",
        "PROVIDER": "cpu",
        "PRECISION": "fp32",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
    } | values
    container = {"name": "main", "image": "i:1", "envFrom": [{"configMapRef": {"name": "pipeline"}}]}
    documents: list[Any] = [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": step, "labels": {"app.kubernetes.io/component": step}},
            "spec": {
                "template": {
                    "metadata": {"labels": {"app.kubernetes.io/component": step}},
                    "spec": {
                        "containers": [container | {"args": ["--mlflow=$(MLFLOW_TRACKING_URI)"]}],
                        "volumes": [
                            {"name": "data", "persistentVolumeClaim": {"claimName": "data"}},
                            {"name": "settings", "configMap": {"name": "train-settings"}},
                        ],
                    },
                }
            },
        }
        for step in STEPS
    ]
    documents.append(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "train", "labels": {"app.kubernetes.io/component": "train"}},
            "spec": {"clusterIP": "None", "selector": {"app.kubernetes.io/component": "train"}},
        }
    )
    folder.mkdir(parents=True)
    (folder / "jobs.yaml").write_text("---\n".join(json.dumps(document) + "\n" for document in documents))
    (folder / "train.yaml").write_text("epochs: 1\n")
    kustomization = {
        "namespace": "purebred",
        "resources": ["jobs.yaml"],
        "configMapGenerator": [
            {"name": "pipeline", "literals": ["RUN_NAME=first", *(f"{k}={v}" for k, v in values.items())]},
            {"name": "train-settings", "files": ["train.yaml"]},
        ],
    }
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization))
    return folder


@pytest.fixture(scope="session")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_overlay(tmp_path_factory.mktemp("overlay") / "small")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A cluster with the platform's claim, whose time passes only while the pipeline waits."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    stand_in = StandIn(folder, kubectl())
    stand_in.add("PersistentVolumeClaim", "data", spec={}, status={"phase": "Bound"})
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(Cluster, "now", lambda self: stand_in.now())
    monkeypatch.setattr(Cluster, "sleep", lambda self, seconds: stand_in.pass_time(seconds))
    return stand_in


@pytest.fixture
def at_once(cluster: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer without starting the program, for tests of many calls."""

    def answer(*arguments: str, given: str | None = None) -> str:
        code, output, message = cluster.answer(list(arguments), given or "")
        if code:
            raise KubectlError(message, output)
        return output

    monkeypatch.setattr(k8s.runner.cluster, "kubectl", answer)


Run = Callable[..., str]


@pytest.fixture
def pipeline(overlay: Path, at_once: None, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the pipeline of run aa, check its exit code, return all that it printed."""

    def run(*arguments: str, code: int = 0) -> str:
        limit = [] if "--timeout" in arguments else ["--timeout", "20m"]  # of time that passes at once
        assert k8s.pipeline.main([str(overlay), "--run", "aa", *limit, *arguments]) == code
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


def made(cluster: StandIn) -> list[str]:
    return [call[-1]["metadata"]["name"] for call in cluster.calls("create")]


def waiting_pod(reason: str, message: str) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"status": {"phase": "Pending", "containerStatuses": [{"name": "main", "state": state}]}}


REFUSED_POD = {
    "status": {
        "phase": "Failed",
        "initContainerStatuses": [{"name": "doctor", "state": {"terminated": {"exitCode": 1}}}],
        "containerStatuses": [{"name": "main", "state": {"waiting": {"reason": "PodInitializing"}}}],
    },
    "_logs": [["doctor", DOCTOR]],
}


# Order, names and settings


def test_steps_run_in_order_each_after_the_last_is_complete(
    cluster: StandIn, overlay: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert k8s.pipeline.main([str(overlay), "--run", "aa", "train", "export", "score"]) == 0
    printed = capsys.readouterr().out
    assert made(cluster) == ["train-aa", "export-aa", "score-aa"]
    times = [int(job["metadata"]["creationTimestamp"][1:]) for job in cluster.objects("job").values()]
    assert times[1] - times[0] >= 10
    assert times[2] - times[1] >= 10
    assert printed.endswith("score-aa: complete\n")


def test_jobs_are_created_and_nothing_that_runs_is_ever_applied(cluster: StandIn, pipeline: Run) -> None:
    """What is applied again changes nothing: settings of their own name, and a Service."""
    pipeline("train")
    applied = [item["kind"] for call in cluster.calls("apply") for item in call[-1]["items"]]
    assert sorted(applied) == ["ConfigMap", "ConfigMap", "Service"]
    assert "suspend" not in cluster.objects("job")["train-aa"]["spec"]


def test_a_job_keeps_its_settings_when_another_run_is_started(
    cluster: StandIn, pipeline: Run, overlay: Path, tmp_path: Path
) -> None:
    """A pod that is evicted and comes back reads what its Job names."""
    other = tmp_path / "other.yaml"
    other.write_text("epochs: 7\n")
    pipeline("train")
    command = [str(overlay), "--run", "bb", "--settings", str(other), "--set", "DATA=/else", "train"]
    assert k8s.pipeline.main(command) == 0
    for run, epochs, data in (("aa", 1, "/data"), ("bb", 7, "/else")):
        pod = cluster.objects("job")[f"train-{run}"]["spec"]["template"]["spec"]
        maps = cluster.objects("configmap")
        values = maps[pod["containers"][0]["envFrom"][0]["configMapRef"]["name"]]
        settings = maps[pod["volumes"][1]["configMap"]["name"]]
        assert (values["data"]["RUN_NAME"], values["data"]["DATA"]) == (run, data)
        assert settings["data"]["train.yaml"] == f"epochs: {epochs}\n"
        assert values["immutable"] is settings["immutable"] is True
        service = cluster.objects("service")[f"train-{run}"]["spec"]["selector"]
        assert service["purebred/run"] == run  # and pods of that run alone
    assert len(maps) == 4


def test_two_pipelines_at_once_leave_each_others_jobs_alone(cluster: StandIn, overlay: Path) -> None:
    commands = [[str(overlay), "--run", run, "train", "export"] for run in ("aa", "bb")]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(k8s.pipeline.main, commands)) == [0, 0]
    assert sorted(made(cluster)) == ["export-aa", "export-bb", "train-aa", "train-bb"]
    assert cluster.calls("delete") == []


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ([], ["train", "export", "score", "merge"]),
        (["--set", "PROVIDER=cuda"], ["train", "export", "verify", "score", "merge"]),
        (
            ["--set", "PROVIDER=cuda", "--set", "PRECISION=tf32"],
            ["train", "export", "verify", "score", "merge"],
        ),
    ],
)
def test_without_steps_a_model_is_verified_where_it_scores(
    cluster: StandIn, pipeline: Run, values: list[str], steps: list[str]
) -> None:
    pipeline(*values)
    assert made(cluster) == [f"{step}-aa" for step in steps]


def test_a_dry_run_prints_what_would_be_made_and_asks_no_cluster(cluster: StandIn, pipeline: Run) -> None:
    printed = pipeline("--dry-run", "train", "export")
    for line in ("  name: train-aa", "  name: export-aa", "  RUN_NAME: aa", "immutable: true"):
        assert f"{line}\n" in printed
    assert printed.count("kind: ConfigMap\n") == 2
    assert cluster.calls("get") == cluster.calls("create") == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_runs_when_its_platform_is_there(
    cluster: StandIn, at_once: None, capsys: pytest.CaptureFixture[str], overlay: str
) -> None:
    command = [overlay, "--run", "aa", "train", "score", "--set", "SHARDS=3"]
    assert k8s.pipeline.main(command) == 2
    assert f"apply -k {os.path.relpath(K8S / 'overlays' / overlay / 'platform')}" in capsys.readouterr().err
    platform = render_folder(K8S / "overlays" / overlay / "platform")
    for document in platform:
        ready = {"phase": "Bound", "availableReplicas": 1}
        cluster.add(document["kind"], document["metadata"]["name"], spec=document.get("spec"), status=ready)
    for secret in ("mlflow-database", "object-store"):
        cluster.add("Secret", secret)
    cluster.set(lag=2)  # a runtime is seen a moment after it was made
    queue = {"after": 1, "admit": True}
    if overlay == "kueue":
        cluster.add("LocalQueue", "training")
    for job in ("train-aa", "score-aa"):
        cluster.plan(
            job, queue, {"after": 10, "condition": "Completed" if overlay == "jobset" else "Complete"}
        )
    assert k8s.pipeline.main(command) == 0
    made = [call[-1] for call in cluster.calls("create")][2 if overlay == "kubeflow" else 0 :]
    kind = {"kubeflow": "TrainJob", "jobset": "JobSet"}.get(overlay, "Job")
    assert [(d["kind"], d["metadata"]["name"]) for d in made] == [(kind, "train-aa"), ("Job", "score-aa")]
    assert made[1]["spec"]["completions"] == 3


def test_nothing_that_is_applied_is_or_suspends_a_job() -> None:
    """As `kubectl apply -k` does, and Argo CD every three minutes."""
    for overlay in OVERLAYS:
        kinds = {d["kind"] for d in render_folder(K8S / "overlays" / overlay / "platform")}
        assert not kinds & {"Job", "JobSet", "TrainJob", "TrainingRuntime", "Namespace"}
        assert not any("suspend" in d["spec"] for d in render_jobs(overlay) if d["kind"] == "Job")


# Jobs that exist


def test_an_active_job_is_refused_before_anything_starts(cluster: StandIn, pipeline: Run) -> None:
    cluster.plan("export-aa", NEVER)
    cluster.add("Job", "export-aa", spec={})
    printed = pipeline("train", "export", code=2)
    assert "export-aa" in printed
    assert "--replace" in printed
    assert made(cluster) == cluster.calls("delete") == []


def test_a_finished_job_is_deleted_and_made_again(cluster: StandIn, pipeline: Run) -> None:
    pipeline("train")
    first = cluster.objects("job")["train-aa"]["metadata"]["uid"]
    pipeline("train")
    assert cluster.objects("job")["train-aa"]["metadata"]["uid"] != first


def test_a_job_that_another_pipeline_makes_in_the_same_moment_is_left_alone(
    cluster: StandIn, pipeline: Run
) -> None:
    """kubectl deletes by name: the finished Job that was seen may be another's active one by now."""
    pipeline("train")
    cluster.plan("train-aa", NEVER)
    cluster.set(rival="patch")
    pipeline("train", code=2)
    assert cluster.calls("delete") == []
    assert "train-aa" in cluster.objects("job")


def test_replace_deletes_an_active_job_and_waits_for_its_pods(cluster: StandIn, pipeline: Run) -> None:
    cluster.set(stay=90.0)
    cluster.add("Job", "train-aa", spec={})
    pipeline("train", "--replace")
    new = cluster.objects("job")["train-aa"]["metadata"]
    assert new["uid"] != "uid-2"
    assert int(new["creationTimestamp"][1:]) >= 90


@pytest.mark.parametrize("happening", [{"remove": True}, {"remake": True}])
def test_a_job_that_somebody_deletes_or_replaces_is_never_complete(
    cluster: StandIn, pipeline: Run, happening: dict[str, bool]
) -> None:
    cluster.plan("train-aa", {"after": 5, **happening}, NEVER)
    printed = pipeline("train", "export", code=1)
    assert "complete" not in printed
    assert made(cluster) == ["train-aa"]


def test_attach_waits_for_an_active_job_with_the_same_settings(cluster: StandIn, pipeline: Run) -> None:
    cluster.plan("train-aa", {"after": 100, "condition": "Complete"})
    pipeline("train", "--timeout", "20", code=3)
    suspended = cluster.objects("job")["train-aa"]
    assert suspended["spec"]["suspend"] is True
    pipeline("train", "--attach", "--set", "DATA=/else", code=2)
    pipeline("train", "export", "--attach")
    assert cluster.objects("job")["train-aa"]["metadata"]["uid"] == suspended["metadata"]["uid"]
    assert made(cluster) == ["train-aa", "export-aa"]
    pipeline("train", "export", "score", "--attach")  # complete Jobs are kept
    assert made(cluster) == ["train-aa", "export-aa", "score-aa"]


def test_what_follows_a_job_that_attach_makes_anew_is_made_anew(cluster: StandIn, pipeline: Run) -> None:
    pipeline("train", "export")
    cluster.plan("train-aa", {"after": 5, "condition": "Failed"})
    pipeline("train", code=1)
    cluster.plan("train-aa", {"after": 5, "condition": "Complete"})
    pipeline("train", "export", "--attach")
    assert made(cluster) == ["train-aa", "export-aa", "train-aa", "train-aa", "export-aa"]


# Failures and their reasons


def test_a_failed_step_ends_the_pipeline_with_what_the_doctor_wrote(
    cluster: StandIn, pipeline: Run
) -> None:
    """Its log is there although the work's container never started."""
    failed = {"after": 10, "pods": [REFUSED_POD], "condition": "Failed", "reason": "PodFailurePolicy"}
    cluster.plan("train-aa", failed)
    printed = pipeline("train", "export", code=1)
    assert DOCTOR in printed
    assert "PodFailurePolicy" in printed
    assert made(cluster) == ["train-aa"]


def test_what_the_doctor_wrote_is_shown_while_the_job_tries_again(cluster: StandIn, pipeline: Run) -> None:
    cluster.plan("train-aa", {"after": 1, "pods": [REFUSED_POD]}, {"after": 200, "condition": "Complete"})
    printed = pipeline("train")
    assert printed.count(DOCTOR) == 1


UNSCHEDULABLE = "0/3 nodes are available: 3 Insufficient cpu."
REASONS = {
    UNSCHEDULABLE: {
        "pods": [
            {
                "status": {
                    "phase": "Pending",
                    "conditions": [
                        {
                            "type": "PodScheduled",
                            "status": "False",
                            "reason": "Unschedulable",
                            "message": UNSCHEDULABLE,
                        }
                    ],
                }
            }
        ]
    },
    "Back-off pulling image": {"pods": [waiting_pod("ImagePullBackOff", 'Back-off pulling image "x"')]},
    'secret "store" not found': {
        "pods": [waiting_pod("CreateContainerConfigError", 'secret "store" not found')]
    },
    "violates PodSecurity": {"events": [{"reason": "FailedCreate", "message": "violates PodSecurity"}]},
    "no node yet": {"pods": [{"spec": {}, "status": {"phase": "Pending"}}]},
    "starts on node node-1": {"pods": [{"status": {"phase": "Pending"}}]},
    "controller's pause": {"pods": [{"status": {"phase": "Failed"}}]},
    "does not answer": {
        "pods": [
            {
                "status": {
                    "phase": "Running",
                    "conditions": [{"type": "Ready", "status": "False"}],
                    "containerStatuses": [{"name": "main", "ready": True, "state": {"running": {}}}],
                }
            }
        ]
    },
    "not ready yet": {
        "pods": [
            {
                "status": {
                    "phase": "Running",
                    "conditions": [{"type": "Ready", "status": "False"}],
                    "containerStatuses": [{"name": "main", "ready": False, "state": {"running": {}}}],
                }
            }
        ]
    },
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_a_job_waits_is_printed_every_minute_and_on_timeout_it_is_suspended(
    cluster: StandIn, pipeline: Run, reason: str
) -> None:
    cluster.plan("train-aa", {"after": 1, **REASONS[reason]}, NEVER)
    printed = pipeline("train", "export", "--timeout", "4m", code=3)
    assert 4 <= printed.count(reason) <= 5
    assert cluster.objects("job")["train-aa"]["spec"]["suspend"] is True
    assert cluster.objects("pod") == {}
    assert "kubectl -n purebred patch job/train-aa" in printed  # resumes it
    assert made(cluster) == ["train-aa"]


def test_a_queue_admits_its_jobs_itself_and_its_reason_is_printed(
    cluster: StandIn, pipeline: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queued = write_overlay(tmp_path / "queued")
    kustomization = json.loads((queued / "kustomization.yaml").read_text())
    kustomization["labels"] = [
        {"pairs": {QUEUE: "training"}, "fields": [{"path": "metadata/labels", "create": True}]}
    ]
    (queued / "kustomization.yaml").write_text(json.dumps(kustomization))
    assert k8s.pipeline.main([str(queued), "--run", "aa", "train"]) == 2
    assert "training" in capsys.readouterr().err  # no such queue
    cluster.add("LocalQueue", "training")
    cluster.plan("train-aa", {"after": 100, "admit": True}, {"after": 110, "condition": "Complete"})
    assert k8s.pipeline.main([str(queued), "--run", "aa", "train"]) == 0
    assert "insufficient unused quota" in capsys.readouterr().out
    assert cluster.calls("patch") == []
    cluster.plan("train-aa", NEVER)
    assert k8s.pipeline.main([str(queued), "--run", "aa", "--timeout", "30", "train"]) == 3
    assert cluster.objects("workload")["job-train-aa"]["spec"]["active"] is False
    cluster.plan("train-aa", {"after": 1, "admit": True}, {"after": 90, "condition": "Complete"})
    assert k8s.pipeline.main([str(queued), "--run", "aa", "--attach", "train"]) == 0
    assert cluster.objects("workload")["job-train-aa"]["spec"]["active"] is True


def test_a_job_in_a_queue_whose_workload_may_not_be_read_is_not_called_suspended(
    cluster: StandIn, pipeline: Run
) -> None:
    """Kueue would start it again."""
    cluster.set(forbidden=[["get", "workload"]])
    cluster.add("LocalQueue", "training")
    label = {"label": {QUEUE: "training"}}
    cluster.plan("train-aa", {"after": 1, **label}, NEVER)
    printed = pipeline("train", "--timeout", "1m", code=3)
    assert "Workload" in printed
    assert "delete job/train-aa" in printed
    assert cluster.calls("patch") == []


def test_a_set_that_lacks_one_of_its_pods_prints_why() -> None:
    """The pod of the other node waits for it."""
    quota = "exceeded quota: gpus"
    answers: dict[str, list[dict[str, Any]]] = {
        "pods": [{"metadata": {"name": "p", "uid": "1"}, "spec": {}, "status": {"phase": "Running"}}],
        "jobs": [
            {
                "metadata": {"uid": "2"},
                "spec": {"parallelism": 2, "completions": 2},
                "status": {"active": 1},
            }
        ],
        "events": [{"involvedObject": {"uid": "2"}, "reason": "FailedCreate", "message": quota}],
    }
    live = {"metadata": {}, "spec": {}}
    assert reasons_of("JobSet", live, answers) == [quota]
    answers["jobs"][0]["status"] = {"active": 2}
    assert reasons_of("JobSet", live, answers) == []


@pytest.mark.parametrize(
    ("kind", "involved"),
    [
        ("Deployment", {"kind": "ReplicaSet", "name": "train-aa-5f6d"}),
        ("TrainJob", {"kind": "JobSet", "name": "train-aa"}),
    ],
)
def test_what_stands_between_a_job_and_its_pods_is_read_too(kind: str, involved: dict[str, str]) -> None:
    event = {"involvedObject": involved, "reason": "FailedCreate", "message": "exceeded quota"}
    live: dict[str, Any] = {"metadata": {}, "spec": {}}
    assert reasons_of(kind, live, {"events": [event]}) == ["exceeded quota"]
    live["metadata"] = {"deletionTimestamp": "t", "finalizers": ["foregroundDeletion"]}
    (reason,) = reasons_of(kind, live, {"events": [event]})
    assert "foregroundDeletion" in reason


def test_a_set_that_starts_anew_is_printed_once_for_each_number(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(answering({}), "train-aa", "JobSet", "0")
    for restarts in (0, 1, 1, 3):
        watch.looked = -100.0
        watch.look({"metadata": {}, "spec": {}, "status": {"restarts": restarts}})
    lines = [line for line in capsys.readouterr().out.splitlines() if "anew" in line]
    assert [re.findall(r"\d+", line) for line in lines] == [["1"], ["3"]]


def test_a_pod_that_waits_for_its_claim_prints_the_claims_event() -> None:
    claim = {"kind": "PersistentVolumeClaim", "name": "data"}
    spec = {"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]}
    pod = {"metadata": {"name": "p", "uid": "1"}, "spec": spec, "status": {"phase": "Pending"}}
    event = {"involvedObject": claim, "reason": "ProvisioningFailed", "message": "only ReadWriteOnce"}
    answers = {"pods": [pod], "events": [event]}
    live = {"metadata": {}, "spec": {}, "status": {"active": 1}}
    (reason,) = reasons_of("Job", live, answers)
    assert "only ReadWriteOnce" in reason


def reasons_of(kind: str, live: dict[str, Any], answers: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What is printed of a Job of which a cluster has these objects."""
    watch = Watch(answering(answers), "train-aa", kind, "0")
    return [*watch.why_none(live, watch.pods()), *watch.why_each(watch.pods())]


def answering(answers: dict[str, list[dict[str, Any]]]) -> Cluster:
    """A cluster with these objects of each kind, and no others."""

    class Answers(Cluster):
        def __init__(self) -> None:
            self.namespace = "purebred"

        def now(self) -> float:
            return 0.0

        def items(self, *arguments: str) -> list[dict[str, Any]]:
            return answers.get(arguments[0], [])

    return Answers()


def test_a_pod_that_never_ends_on_a_node_that_is_gone_is_named_with_what_to_type(
    cluster: StandIn, pipeline: Run
) -> None:
    pod = {
        "metadata": {"deletionTimestamp": "t", "deletionGracePeriodSeconds": 90},
        "spec": {"nodeName": "node-7"},
        "status": {"phase": "Running"},
    }
    cluster.plan("train-aa", {"after": 1, "pods": [pod]}, NEVER)
    printed = pipeline("train", "--timeout", "5m", code=3)
    assert "kubectl delete node node-7" in printed
    assert "node.kubernetes.io/out-of-service" in printed
    assert "kubectl -n purebred delete pod train-aa-0 --force --grace-period=0" in printed


# What is found before anything starts


def with_volume(tmp_path: Path, source: dict[str, Any]) -> Path:
    folder = write_overlay(tmp_path / "more")
    documents = (folder / "jobs.yaml").read_text()
    added = json.dumps({"name": "more", **source})
    (folder / "jobs.yaml").write_text(documents.replace('"volumes": [', f'"volumes": [{added}, '))
    return folder


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ({"secret": {"secretName": "store"}}, "create secret generic store"),
        ({"persistentVolumeClaim": {"claimName": "scratch"}}, "scratch"),
        ({"projected": {"sources": [{"secret": {"name": "store"}}]}}, "create secret generic store"),
        ({"configMap": {"name": "certificates"}}, "certificates"),
    ],
)
def test_a_name_that_no_pod_would_find_is_refused_before_anything_starts(
    cluster: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: dict[str, Any], named: str
) -> None:
    folder = with_volume(tmp_path, source)
    assert k8s.pipeline.main([str(folder), "--run", "aa", "train"]) == 2
    assert named in capsys.readouterr().err
    assert made(cluster) == []


@pytest.mark.parametrize(
    ("claim", "event"),
    [
        ({}, {"reason": "FailedBinding", "message": "no storage class is set"}),
        ({"storageClassName": "fast"}, {"reason": "ProvisioningFailed", "message": '"fast" not found'}),
    ],
)
def test_a_claim_that_nothing_can_bind_is_refused_before_anything_starts(
    cluster: StandIn, pipeline: Run, claim: dict[str, str], event: dict[str, str]
) -> None:
    """By its events: a StorageClass belongs to the cluster, and `edit` may not read it."""
    cluster.add("PersistentVolumeClaim", "data", spec=claim, status={"phase": "Pending"})
    owner = {"kind": "PersistentVolumeClaim", "name": "data"}
    cluster.add("Event", "e", type="Warning", involvedObject=owner, **event)
    assert event["message"] in pipeline("train", code=2)
    assert made(cluster) == []


def test_a_claim_that_waits_for_its_first_pod_is_none_of_those(cluster: StandIn, pipeline: Run) -> None:
    cluster.add("PersistentVolumeClaim", "data", spec={}, status={"phase": "Pending"})
    pipeline("train")


def server(**status: int) -> dict[str, Any]:
    variable = {"name": "P", "valueFrom": {"secretKeyRef": {"name": "mlflow-database", "key": "password"}}}
    pod = {"containers": [{"name": "mlflow", "env": [variable]}], "volumes": []}
    selector = {"matchLabels": {"app.kubernetes.io/name": "mlflow"}}
    return {"spec": {"selector": selector, "template": {"spec": pod}}, "status": status}


def test_the_secret_of_the_tracking_server_is_missed_at_once(cluster: StandIn, pipeline: Run) -> None:
    cluster.add("Deployment", "mlflow", **server())
    assert "create secret generic mlflow-database --from-literal=password=" in pipeline("train", code=2)
    assert cluster.now() == 0


def test_a_tracking_server_of_the_namespace_is_waited_for_and_a_teams_own_is_not(
    cluster: StandIn, pipeline: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(k8s.runner.checks, "SERVER_STARTS", 20.0)
    pipeline("train")  # none here
    cluster.add("Deployment", "mlflow", **server())
    cluster.add("Secret", "mlflow-database")
    assert "deployment/mlflow" in pipeline("train", code=3)
    pipeline("train", "--set", "MLFLOW_TRACKING_URI=https://mlflow.example.com")
    assert "deployment/mlflow" in pipeline(
        "train", "--set", "MLFLOW_TRACKING_URI=http://mlflow.purebred.svc.cluster.local:5000", code=3
    )
    cluster.add("Deployment", "mlflow", **server(availableReplicas=1))
    pipeline("train")


@pytest.mark.parametrize("right", [["create", "job"], ["patch", "job"], ["list", "pod"]])
def test_a_missing_right_is_found_before_anything_starts(
    cluster: StandIn, pipeline: Run, right: list[str]
) -> None:
    cluster.set(forbidden=[right])
    assert " ".join(right) in pipeline("train", code=2)
    assert made(cluster) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["mars", "--run", "aa"],
        ["cpu", "--run", "Aa"],
        ["cpu", "--run", "a" * 41],
        ["cpu", "--run", "aa", "exprot"],
        ["cpu", "--run", "aa", "train", "train"],
        ["cpu", "--run", "aa", "--set", "IMAGE=/data"],
        ["cpu", "--run", "aa", "--set", "RUN_NAME=bb"],
        ["cpu", "--run", "aa", "--set", "DATA"],
        ["gpu", "--run", "aa", "--set", "SHARDS_AT_ONCE=0"],
        ["gpu", "--run", "aa", "--set", "NODES=two"],
        ["cpu", "--run", "aa", "--settings", "gone.yaml"],
        ["s3", "--run", "aa", "--set", "RUNS=s3://bucket/runs/"],
        ["gpu", "--run", "aa", "--set", "SHM=512Mi"],
        ["gpu", "--run", "aa", "--set", "PROVIDER=CUDA"],
        ["gpu", "--run", "aa", "--set", "PRECISION=fp16"],
    ],
)
def test_unusable_arguments_are_exit_code_2(cluster: StandIn, overlay: Path, arguments: list[str]) -> None:
    assert k8s.pipeline.main([str(overlay) if a == "cpu" else a for a in arguments]) == 2
    assert made(cluster) == []


@pytest.mark.parametrize(
    ("line", "code"),
    [("data: /data/mine  # here", 2), ("data: '/data'", 0), ("data: ''", 0), ("val_data: /data/val", 0)],
)
def test_settings_that_name_other_data_than_the_job_trains_on_are_refused(
    overlay: Path, tmp_path: Path, line: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.yaml").write_text(f"epochs: 3\n{line}\n")
    arguments = [str(overlay), "--run", "aa", "--settings", str(tmp_path / "train.yaml"), "--dry-run"]
    assert k8s.pipeline.main([*arguments, "train"]) == code
    assert ("--set DATA=/data/mine" in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize(
    "arguments", [["cpu"], ["cpu", "--run", "aa", "--timeout", "soon"], ["--run", "aa"]]
)
def test_unusable_flags_are_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        k8s.pipeline.main(arguments)
    assert stopped.value.code == 2


def test_a_number_that_yaml_reads_otherwise_is_refused_by_its_name(
    cluster: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert k8s.pipeline.main(["gpu", "--run", "aa", "--set", "SHARDS=08"]) == 2
    assert "SHARDS=08" in capsys.readouterr().err


def test_the_last_value_of_a_key_counts(cluster: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    values = ["--set", "SHARDS=3", "--set", "IMAGES=/x", "--set", "SHARDS=4"]
    assert k8s.pipeline.main(["gpu", "--run", "aa", *values, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^  SHARDS: \"?4", printed, re.M)
    assert re.search("^  IMAGES: /x$", printed, re.M)


def test_the_known_providers_are_those_of_scoring() -> None:
    assert k8s.runner.render.PRECISIONS == PRECISIONS


def test_settings_that_jobs_would_share_are_refused(
    cluster: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_overlay(tmp_path / "shared")
    kustomization = json.loads((folder / "kustomization.yaml").read_text())
    kustomization["generatorOptions"] = {"disableNameSuffixHash": True}
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization))
    assert k8s.pipeline.main([str(folder), "--run", "aa", "train"]) == 2
    assert "disableNameSuffixHash" in capsys.readouterr().err


# The network, and the end of the pipeline itself


def test_a_call_that_the_network_cut_off_is_repeated(cluster: StandIn, pipeline: Run) -> None:
    cluster.set(cut=[[3, 200]])
    assert "i/o timeout" in pipeline("train", "export")


@pytest.mark.parametrize("lost", [["create"], ["create", "create"], ["apply"], ["get"]])
def test_a_job_whose_making_got_no_answer_is_made_once(
    cluster: StandIn, pipeline: Run, lost: list[str]
) -> None:
    cluster.set(lose_answers=lost)
    pipeline("train")  # what was lost is asked for again
    assert len(cluster.objects("job")) == 1


def test_what_the_real_kubectl_prints_of_a_server_that_is_down_is_a_call_that_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(kubectl()).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(KubectlError) as refused:
        k8s.runner.cluster.kubectl("get", "pods", "--server=http://127.0.0.1:1")
    assert refused.value.cut_off


def test_a_persons_defaults_for_kubectl_change_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as `delete --interactive`."""
    monkeypatch.setenv("PATH", f"{Path(kubectl()).parent}{os.pathsep}{os.environ['PATH']}")
    default = {"command": "version", "options": [{"name": "output", "default": "json"}]}
    kind = {"apiVersion": "kubectl.config.k8s.io/v1beta1", "kind": "Preference"}
    (tmp_path / "kuberc").write_text(json.dumps(kind | {"defaults": [default]}))
    monkeypatch.setenv("KUBERC", str(tmp_path / "kuberc"))
    assert not k8s.runner.cluster.kubectl("version", "--client").startswith("{")


@pytest.mark.parametrize(
    "message",
    [
        "Error from server (TooManyRequests): storage is (re)initializing",
        'Error from server (InternalError): Internal error occurred: failed calling webhook "mjob.kb.io": '
        'no endpoints available for service "kueue-webhook-service"',
    ],
)
def test_what_passes_within_a_moment_is_a_call_that_was_cut_off(message: str) -> None:
    assert KubectlError(message).cut_off
    assert not KubectlError('Error from server (NotFound): jobs.batch "train-aa" not found').cut_off


def test_a_cluster_that_never_answered_is_not_waited_for(cluster: StandIn, pipeline: Run) -> None:
    cluster.set(cut=[[0, 10**6]])
    pipeline("train", code=2)
    assert cluster.now() == 0


@pytest.mark.parametrize("lost", ["apply", "create"])
def test_a_cluster_that_is_gone_while_a_step_is_started_is_tried_for_five_minutes(
    cluster: StandIn, pipeline: Run, lost: str
) -> None:
    cluster.set(lose_answers=[lost, "get"] * 100 if lost == "create" else [lost] * 100)
    pipeline("train", code=3)
    assert 300 <= cluster.now() <= 700


def test_a_cluster_that_is_gone_for_longer_than_the_timeout_is_exit_code_3(
    cluster: StandIn, pipeline: Run
) -> None:
    cluster.set(cut=[[3, 10**6]])
    assert "cannot be suspended" in pipeline("train", "--timeout", "2m", code=3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_pipeline_leaves_its_job_running_and_prints_what_to_type(
    cluster: StandIn, overlay: Path, number: int, code: int
) -> None:
    cluster.plan("train-aa", NEVER)
    command = [sys.executable, str(K8S / "pipeline.py"), str(overlay), "--run", "aa", "train"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "train-aa: started\n"
        process.send_signal(number)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == code
    assert "kubectl -n purebred delete job/train-aa" in printed
    assert "--attach" in printed
    assert cluster.calls("delete") == []
    assert "suspend" not in cluster.objects("job")["train-aa"]["spec"]

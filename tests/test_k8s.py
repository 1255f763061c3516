"""The manifests: valid for two Kubernetes versions and for what only an API server checks."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import REPOSITORY
from kubeflow_trainer_api import models
from manifests import (
    K8S,
    OVERLAYS,
    deployment,
    first_words,
    jobs,
    load,
    named,
    pods,
    quantity,
    refusals,
    render,
    restricted,
)

import serve.main

VERSIONS = ("1.36", "1.37")
KUBEFLOW: dict[str, Any] = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}
DOCUMENTED = (REPOSITORY / "docs" / "kubernetes.md").read_text(encoding="utf-8")
TORCHRUN_GRACE = 30  # seconds from SIGTERM to SIGKILL of the workers

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


# Schemas


@pytest.mark.parametrize("version", VERSIONS)
@each_overlay
def test_every_manifest_fits_the_strict_schema_of_its_kind(overlay: str, version: str) -> None:
    for document in render(overlay):
        if document["kind"] in KUBEFLOW:
            continue  # below
        assert kubernetes_validate.validate(document, version, strict=True) == version  # else: raises


@each_overlay
def test_kubeflow_resources_fit_its_own_models_and_no_field_is_dropped(overlay: str) -> None:
    for document in render(overlay):
        if document["kind"] in KUBEFLOW:
            assert KUBEFLOW[document["kind"]].from_dict(document).to_dict() == document


@pytest.mark.parametrize("version", VERSIONS)
def test_the_training_runtimes_pods_fit_the_schema_of_a_job(version: str) -> None:
    (job,) = named(render("kubeflow"), "TrainingRuntime", "purebred")["spec"]["template"]["spec"][
        "replicatedJobs"
    ]
    document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}}
    document |= {"spec": job["template"]["spec"]}
    kubernetes_validate.validate(document, version, strict=True)
    assert not refusals(document)


def test_no_file_has_a_key_twice() -> None:
    files = sorted(K8S.rglob("*.yaml"))
    assert len(files) > 15
    for path in files:
        load(path.read_text(encoding="utf-8"))
    with pytest.raises(yaml.YAMLError, match="twice"):
        load("a: 1\nb: {c: 1, c: 2}\n")


# What only an API server refuses


@each_overlay
def test_an_api_server_would_accept_every_manifest(overlay: str) -> None:
    assert {d["metadata"]["name"]: r for d in render(overlay) if (r := refusals(d))} == {}


@each_overlay
def test_the_restricted_pod_security_profile_lets_every_pod_run(overlay: str) -> None:
    assert {pod.owner: r for pod in pods(render(overlay)) if (r := restricted(pod.spec))} == {}
    labels = named(render(overlay), "Namespace", "purebred")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


# Names that must resolve


@each_overlay
def test_every_claim_config_map_secret_service_and_runtime_that_is_named_exists(overlay: str) -> None:
    documents = render(overlay)
    there = {(d["kind"], d["metadata"]["name"]) for d in documents}
    there |= {
        ("Secret", name) for name in re.findall(r"create secret generic ([-\w]+)", DOCUMENTED)
    }  # made by hand: no manifest holds a password
    assert {d["metadata"].get("namespace") for d in documents} == {"purebred", None}
    for pod in pods(documents):
        for volume in pod.spec.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in there
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there
        for each in pod.containers:
            for source in each.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in there
            for variable in each.get("env", []):
                if "valueFrom" in variable:
                    assert ("Secret", variable["valueFrom"]["secretKeyRef"]["name"]) in there
    for document in documents:
        if document["kind"] == "TrainJob":
            assert ("TrainingRuntime", document["spec"]["runtimeRef"]["name"]) in there
    assert not any(d["kind"] == "Secret" for d in documents)


@each_overlay
def test_every_service_and_network_policy_selects_a_pod_and_a_port_of_it(overlay: str) -> None:
    documents = render(overlay)
    checked = 0
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            wanted, ports = spec["selector"], [port.get("targetPort") for port in spec["ports"]]
        elif document["kind"] == "NetworkPolicy":
            wanted = spec["podSelector"]["matchLabels"]
            ports = [port["port"] for ingress in spec["ingress"] for port in ingress["ports"]]
            for ingress in spec["ingress"]:
                callers = ingress["from"][0]["podSelector"]["matchLabels"].items()
                assert any(callers <= dict(pod.labels).items() for pod in pods(documents))
        else:
            continue
        selected = [pod for pod in pods(documents) if wanted.items() <= dict(pod.labels).items()]
        assert selected, document["metadata"]["name"]
        names = {
            port["name"] for pod in selected for each in pod.containers for port in each.get("ports", [])
        }
        assert {port for port in ports if isinstance(port, str)} <= names
        checked += 1
    assert checked >= 4


@each_overlay
def test_urls_and_rendezvous_endpoints_name_a_service_and_its_port(overlay: str) -> None:
    documents = render(overlay)
    pipeline = named(documents, "ConfigMap", "pipeline")["data"]
    mlflow_env = {e["name"]: e.get("value") for e in deployment(documents)["env"]}
    texts = [pipeline["MLFLOW_TRACKING_URI"], mlflow_env["MLFLOW_BACKEND_STORE_URI"]]
    for text in texts:
        host, port = re.search(r"(?:@|//)([-\w]+):(\d+)", text).groups()  # type: ignore[union-attr]
        assert int(port) in [p["port"] for p in named(documents, "Service", host)["spec"]["ports"]]
    for pod in jobs(overlay):
        if subdomain := pod.spec.get("subdomain"):
            service = named(documents, "Service", subdomain)["spec"]
            assert service["clusterIP"] == "None"
            assert service["publishNotReadyAddresses"] is True
            assert service["selector"].items() <= dict(pod.labels).items()


# What every pod of ours has


@each_overlay
def test_every_pod_has_shared_memory_resources_a_read_only_root_and_no_token(overlay: str) -> None:
    for pod in pods(render(overlay)):
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        assert pod.spec["automountServiceAccountToken"] is False
        assert pod.spec["enableServiceLinks"] is False
        for each in pod.containers:
            mounts = {mount["mountPath"]: mount for mount in each["volumeMounts"]}
            assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
            assert "emptyDir" in volumes[mounts["/tmp"]["name"]]
            assert each["securityContext"]["readOnlyRootFilesystem"] is True
            resources = each["resources"]
            for name in ("cpu", "memory"):
                assert quantity(resources["requests"][name]) > 0
                assert quantity(resources["limits"][name]) > 0
            shm = volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["sizeLimit"]
            assert quantity(shm) < quantity(resources["limits"]["memory"])  # it counts towards it


@each_overlay
def test_a_training_pod_has_longer_to_end_than_torchrun_gives_its_workers(overlay: str) -> None:
    trainings = [pod for pod in jobs(overlay) if "train" in first_words(pod)]
    assert trainings
    for pod in trainings:
        assert pod.spec["terminationGracePeriodSeconds"] > TORCHRUN_GRACE + 10


@each_overlay
def test_jobs_wait_for_the_pipeline_and_survive_evictions(overlay: str) -> None:
    for document in render(overlay):
        if document["kind"] in ("Job", "TrainJob"):
            assert document["spec"]["suspend"] is True
        if document["kind"] == "Job":
            first = document["spec"]["podFailurePolicy"]["rules"][0]
            assert first["action"] == "Ignore"
            assert first["onPodConditions"][0]["type"] == "DisruptionTarget"


@each_overlay
def test_scoring_spreads_over_nodes_and_gives_up_an_index_for_our_exit_code_2(overlay: str) -> None:
    score = named(render(overlay), "Job", "score")["spec"]
    (spread,) = score["template"]["spec"]["topologySpreadConstraints"]
    wanted = spread["labelSelector"]["matchLabels"].items()
    assert wanted <= score["template"]["metadata"]["labels"].items()
    failing = score["podFailurePolicy"]["rules"][1]
    assert (failing["action"], failing["onExitCodes"]["values"]) == ("FailIndex", [2, 4])
    assert "2: unusable arguments" in (serve.main.main.__doc__ or "")


@each_overlay
def test_the_doctor_sees_what_the_work_will_have(overlay: str) -> None:
    """Same image, limits, environment and mounts (but the settings, which it does not read)."""
    for pod in jobs(overlay):
        (doctor,) = pod.spec["initContainers"]
        (work,) = pod.spec["containers"]
        for key in ("image", "resources", "envFrom", "securityContext"):
            assert doctor[key] == work[key], (pod.owner, key)
        assert doctor["volumeMounts"] == [m for m in work["volumeMounts"] if m["name"] != "settings"]


# Overlays


def test_every_gpu_container_asks_for_as_many_as_its_limit_and_tolerates_gpu_nodes() -> None:
    with_gpu = [
        pod for pod in jobs("gpu") if "nvidia.com/gpu" in pod.spec["containers"][0]["resources"]["limits"]
    ]
    assert {pod.owner for pod in with_gpu} == {
        "Job/train",
        "Job/train-multinode",
        "Job/verify",
        "Job/score",
    }
    for pod in with_gpu:
        assert pod.spec["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_kueue_gets_every_job() -> None:
    for document in render("kueue"):
        if document["kind"] == "Job":
            assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]


# Image and scripts


def lint(program: str, *files: Path) -> None:
    command = [Path(sys.executable).with_name(program), *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_scripts_pass_their_linter() -> None:
    lint("shellcheck", *sorted(K8S.glob("*.sh")))


@pytest.mark.slow
def test_the_dockerfile_passes_its_linter() -> None:
    lint("hadolint", K8S / "Dockerfile")


def test_images_start_from_pinned_bytes_and_end_without_root_or_a_compiler() -> None:
    text = (K8S / "Dockerfile").read_text(encoding="utf-8")
    bases = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", text, re.MULTILINE)
    names = {name for _, name in bases}
    assert {"train", "serve", "mlflow"} <= names
    assert {base for base, _ in bases if base not in names} == {"${PYTHON}@${PYTHON_DIGEST}"}
    final = text[text.index("AS runtime") :]
    assert re.search(r"^USER (\d+):(\d+)$", final, re.MULTILINE)
    assert re.findall(r"--no-install-recommends (.*) \\", final) == ["tini"]
    used = {each["image"].partition(":")[0] for overlay in OVERLAYS for pod in pods(render(overlay))
            for each in pod.containers}  # fmt: skip
    assert used == {"postgres"} | {f"purebred-{name}" for name in ("train", "serve", "mlflow")}


def test_the_serving_image_holds_no_training_code() -> None:
    text = (K8S / "Dockerfile").read_text(encoding="utf-8")
    stage = text[text.index("AS build-serve") : text.index("AS build-train")]
    assert re.findall(r"^COPY (\S+)", stage, re.MULTILINE) == ["serve"]
    assert "[parquet,heic,cloud]" in stage

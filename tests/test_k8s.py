"""The manifests: valid for two Kubernetes versions and for what only an API server checks."""

import re
import subprocess
import sys
from pathlib import Path

import mlflow.environment_variables
import pytest
import yaml
from conftest import REPOSITORY
from manifest_schemas import check, inner_job
from manifests import (
    K8S,
    OVERLAYS,
    Manifest,
    config,
    deployment,
    first_words,
    for_run,
    jobs,
    load,
    named,
    pods,
    quantity,
    render,
    render_folder,
    render_jobs,
)

import serve.main

PAGES = sorted((REPOSITORY / "docs").glob("kubernetes*.md"))
DOCUMENTED = "".join(page.read_text(encoding="utf-8") for page in PAGES)
TORCHRUN_GRACE = 30  # seconds from SIGTERM to SIGKILL of the workers

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


# Schemas, and what only an API server refuses


@each_overlay
def test_every_manifest_is_valid_and_lets_its_pods_run_under_the_restricted_profile(overlay: str) -> None:
    check(render(overlay))


def test_no_file_has_a_key_twice() -> None:
    files = sorted(K8S.rglob("*.yaml"))
    assert len(files) > 15
    for path in files:
        load(path.read_text(encoding="utf-8"))
    with pytest.raises(yaml.YAMLError, match="twice"):
        load("a: 1\nb: {c: 1, c: 2}\n")


# Names that must resolve


@each_overlay
def test_every_claim_config_map_secret_service_and_runtime_that_is_named_exists(overlay: str) -> None:
    documents = render(overlay)
    there = {(d["kind"], d["metadata"]["name"]) for d in documents}
    there |= {
        ("Secret", name) for name in re.findall(r"create secret generic ([-\w]+)", DOCUMENTED)
    }  # made by hand: no manifest holds a password
    for pod in pods(documents):
        for volume in pod.spec.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in there
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there
        for each in pod.containers:
            for source in each.get("envFrom", []):
                kind = "ConfigMap" if "configMapRef" in source else "Secret"
                (reference,) = source.values()
                assert (kind, reference["name"]) in there
            for variable in each.get("env", []):
                if "secretKeyRef" in variable.get("valueFrom", {}):
                    assert ("Secret", variable["valueFrom"]["secretKeyRef"]["name"]) in there
        assert ("ServiceAccount", pod.spec.get("serviceAccountName", "purebred")) in there
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
            ports = [port["port"] for ingress in spec["ingress"] for port in ingress.get("ports", [])]
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
    assert checked >= 1


@each_overlay
def test_urls_and_rendezvous_endpoints_name_a_service_and_its_port(overlay: str) -> None:
    documents = render(overlay)
    texts = [config(documents, "pipeline")["MLFLOW_TRACKING_URI"]]
    if overlay == "s3":  # a team's own server
        assert texts.pop().startswith("https://")
        assert not any(d["kind"] == "Deployment" for d in documents)
    else:
        texts += [
            e["value"] for e in deployment(documents)["env"] if e["name"] == "MLFLOW_BACKEND_STORE_URI"
        ]
        assert len(texts) == 2
        assert "$(" not in texts[1], "a password could end the address"
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
def test_jobs_are_no_part_of_the_platform_and_survive_evictions(overlay: str) -> None:
    """Applying the platform again, as Argo CD and Flux do all the time, must not touch a Job."""
    made = {"Job", "TrainJob", "JobSet"}
    platform = render_folder(K8S / "overlays" / overlay / "platform")
    assert not made & {d["kind"] for d in platform}
    for document in render_jobs(overlay):
        if document["kind"] in made:
            assert "suspend" not in document["spec"]
        if document["kind"] == "Job":
            first = document["spec"]["podFailurePolicy"]["rules"][0]
            assert first["action"] == "Ignore"
            assert first["onPodConditions"][0]["type"] == "DisruptionTarget"


@each_overlay
def test_who_may_edit_one_namespace_can_apply_and_create_all(overlay: str) -> None:
    """`edit` covers these kinds (JobSet and TrainJob where their charts add them), nothing names one."""
    editable = {"ConfigMap", "Deployment", "Job", "NetworkPolicy", "PersistentVolumeClaim", "Service"}
    editable |= {"ServiceAccount", "StatefulSet", "JobSet", "TrainJob", "TrainingRuntime"}
    documents = render(overlay)
    assert {d["kind"] for d in documents} <= editable
    assert not any("namespace" in d["metadata"] for d in documents)


def test_overlays_of_one_namespace_never_change_each_others_claims() -> None:
    claims: dict[str, Manifest] = {}
    for overlay in OVERLAYS:
        for document in render(overlay):
            if document["kind"] == "PersistentVolumeClaim":
                assert claims.setdefault(document["metadata"]["name"], document) == document
    assert set(claims) == {
        "data",
        "runs",
        "data-one-node",
        "runs-one-node",
        "mlflow-artifacts",
        "mlflow-database",
    }


@each_overlay
def test_what_runs_on_several_nodes_has_volumes_for_several(overlay: str) -> None:
    documents = render(overlay)
    claims = {
        d["metadata"]["name"]: d["spec"]["accessModes"] for d in documents if d["kind"].endswith("Claim")
    }
    nodes = int(config(documents, "pipeline")["NODES"])
    for pod in jobs(overlay):
        for volume in pod.spec["volumes"]:
            if nodes > 1 and "persistentVolumeClaim" in volume:
                assert claims[volume["persistentVolumeClaim"]["claimName"]] == ["ReadWriteMany"]


@each_overlay
def test_unusable_settings_fail_training_at_once_and_a_lost_rank_is_met_inside(overlay: str) -> None:
    """Each failed pod doubles the Job controller's pause; exit code 2 would come again."""
    (pod,) = (pod for pod in jobs(overlay) if "train" in first_words(pod))
    (work,) = pod.spec["containers"]
    rules = [rule for rule in pod.job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    # of the doctor too, which finds missing data first: no containerName
    assert [rule["onExitCodes"] for rule in rules] == [{"operator": "In", "values": [2]}]
    for document in render(overlay):
        if document["kind"] in ("JobSet", "TrainingRuntime"):
            policy = (document["spec"].get("template") or document)["spec"]["failurePolicy"]
            (rule,) = policy["rules"]
            assert (rule["action"], policy["maxRestarts"]) == ("FailJobSet", 100)
            assert "PodFailurePolicy" in rule["onJobFailureReasons"]
            assert pod.job["backoffLimit"] == 0  # the set starts anew, not one Job's pod
    own = {variable["name"]: variable.get("value") for variable in work.get("env", [])}
    restarts = own.get("RESTARTS", config(render(overlay), "pipeline")["RESTARTS"])
    assert int(restarts) == (0 if overlay == "kubeflow" else 20)


def test_the_tracking_server_runs_no_jobs_of_its_own() -> None:
    """They filled its memory: 1.99 GB with one client, 0.6 GB without."""
    variables = {v["name"]: v.get("value") for v in deployment(render("cpu"))["env"]}
    assert variables["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert hasattr(mlflow.environment_variables, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION")


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
        settings = {variable["name"]: variable for variable in work.get("env", [])}
        assert all(settings[variable["name"]] == variable for variable in doctor.get("env", []))
        assert doctor["volumeMounts"] == [m for m in work["volumeMounts"] if m["name"] != "settings"]


# Overlays


def test_every_gpu_container_asks_for_as_many_as_its_limit_and_tolerates_gpu_nodes() -> None:
    for overlay, training in (("gpu", "Job"), ("jobset", "JobSet"), ("kubeflow", "TrainingRuntime")):
        with_gpu = [
            pod
            for pod in jobs(overlay)
            if "nvidia.com/gpu" in pod.spec["containers"][0]["resources"]["limits"]
        ]
        assert {pod.owner for pod in with_gpu} == {f"{training}/train", "Job/verify", "Job/score"}
        for pod in with_gpu:
            assert pod.spec["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_kueue_gets_every_job() -> None:
    for document in render_jobs("kueue"):
        if document["kind"] == "Job":
            assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]


# One run


@each_overlay
def test_a_runs_objects_have_names_selectors_and_settings_of_their_own(
    overlay: str,
) -> None:
    """Two runs in one namespace share nothing that is made for one of them."""
    documents = for_run(overlay, "aa")
    there = {(d["kind"], d["metadata"]["name"]) for d in documents}
    other = {(d["kind"], d["metadata"]["name"]) for d in for_run(overlay, "bb")}
    assert not there & {(kind, name) for kind, name in other if not name.startswith("train-settings")}
    for document in [*render_jobs(overlay), *documents]:
        assert document["kind"] != "ConfigMap" or document["immutable"] is True
    for document in documents:
        assert "-aa" in document["metadata"]["name"]
        if document["kind"] == "Service":
            assert document["spec"]["selector"]["purebred/run"] == "aa"
        if document["kind"] == "NetworkPolicy":
            assert document["spec"]["podSelector"]["matchLabels"]["purebred/run"] == "aa"
            (rule,) = document["spec"]["ingress"]
            assert rule["from"][0]["podSelector"]["matchLabels"]["purebred/run"] == "aa"
        if document["kind"] == "TrainJob":
            assert document["spec"]["runtimeRef"]["name"] == "train-aa"
    for pod in pods(documents):
        assert pod.labels["purebred/run"] == "aa"
        assert pod.spec.get("subdomain", "train-aa") == "train-aa"
        for each in pod.containers:
            for source in each["envFrom"]:
                if "configMapRef" in source:
                    assert ("ConfigMap", source["configMapRef"]["name"]) in there
        for volume in pod.spec["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there


def test_a_value_of_the_settings_changes_the_name_of_what_holds_them() -> None:
    """So that a running Job keeps what it started with."""
    names = {
        d["metadata"]["name"]
        for values in (["DATA=/data/a"], ["DATA=/data/b"])
        for d in for_run("cpu", "aa", *values)
        if d["kind"] == "ConfigMap" and "pipeline" in d["metadata"]["name"]
    }
    assert len(names) == 2


@each_overlay
def test_one_value_sets_nodes_and_shards_everywhere(overlay: str) -> None:
    documents = for_run(overlay, "aa", "NODES=3", "SHARDS=7", "SHARDS_AT_ONCE=5", "PROCESSES=4")
    score = named(documents, "Job", "score-aa")["spec"]
    assert (score["completions"], score["parallelism"]) == (7, 5)
    for document in documents:
        if document["metadata"]["name"] != "train-aa":
            continue
        if document["kind"] in ("Job", "JobSet"):
            job = document if document["kind"] == "Job" else inner_job(document)
            assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (3, 3)
        if document["kind"] == "TrainJob":
            assert document["spec"]["trainer"] == {"numNodes": 3, "numProcPerNode": 4}


def test_the_training_runtime_comes_before_the_train_job() -> None:
    """The webhook refuses a TrainJob without one; kustomize's own order is by kind."""
    for documents in (render_jobs("kubeflow"), for_run("kubeflow", "aa")):
        kinds = [d["kind"] for d in documents]
        assert kinds.index("TrainingRuntime") < kinds.index("TrainJob")


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
    assert used == {"postgres"} | {f"purebred-{name}" for name in ("train", "serve", "serve-gpu", "mlflow")}


def test_the_serving_image_holds_no_training_code() -> None:
    text = (K8S / "Dockerfile").read_text(encoding="utf-8")
    stage = text[text.index("AS build-serve") : text.index("AS build-train")]
    assert re.findall(r"^COPY (\S+)", stage, re.MULTILINE) == ["k8s/locks/${SERVE}.txt", "serve"]


@each_overlay
def test_what_scores_with_cuda_has_the_image_for_it(overlay: str) -> None:
    documents = render(overlay)
    cuda = config(documents, "pipeline")["PROVIDER"] == "cuda"
    pod = named(documents, "Job", "score")["spec"]["template"]["spec"]
    images = {container["image"] for container in (*pod["containers"], *pod["initContainers"])}
    assert images == {"purebred-serve-gpu:0.1.0" if cuda else "purebred-serve:0.1.0"}

"""The manifests: valid for two Kubernetes versions and for what only an API server checks."""

import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import mlflow.cli
import pytest
import yaml
from conftest import REPOSITORY
from kubeflow_trainer_api import models
from manifests import (
    K8S,
    OVERLAYS,
    Manifest,
    Pod,
    expand,
    load,
    named,
    pods,
    quantity,
    refusals,
    render,
    restricted,
)
from mlflow.server.security_utils import is_allowed_host_header
from torch.distributed.run import get_args_parser

import export.main
import serve.doctor
import serve.main
import serve.merge
from train.config import TrainConfig, parse_config

VERSIONS = ("1.36", "1.37")
KUBEFLOW: dict[str, Any] = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}
DOCUMENTED = (REPOSITORY / "docs" / "kubernetes.md").read_text(encoding="utf-8")
TORCHRUN_GRACE = 30  # seconds from SIGTERM to SIGKILL of the workers

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def jobs(overlay: str) -> list[Pod]:
    """The pods of this project's own programs."""
    return [pod for pod in pods(render(overlay)) if pod.job]


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


Break = Callable[[Manifest], object]


def container(job: Manifest) -> Manifest:
    first: Manifest = job["spec"]["template"]["spec"]["containers"][0]
    return first


def rule(job: Manifest) -> Manifest:
    codes: Manifest = job["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]
    return codes


BROKEN: dict[str, Break] = {
    "is below the request": lambda job: container(job)["resources"]["limits"].update(memory="1Mi"),
    "requested without a limit": lambda job: container(job)["resources"]["requests"].update(
        {"nvidia.com/gpu": 1}
    ),
    "without a volume": lambda job: job["spec"]["template"]["spec"]["volumes"].pop(),
    "restartPolicy Always": lambda job: job["spec"]["template"]["spec"].pop("restartPolicy"),
    "needs restartPolicy Never": lambda job: job["spec"]["template"]["spec"].update(
        restartPolicy="OnFailure"
    ),
    "backoffLimitPerIndex without Indexed": lambda job: job["spec"].pop("completionMode"),
    "successPolicy without Indexed": lambda job: job["spec"].update(
        completionMode="NonIndexed", successPolicy={"rules": [{"succeededCount": 1}]}
    ),
    "maxFailedIndexes above completions": lambda job: job["spec"].update(maxFailedIndexes=9),
    "FailIndex without backoffLimitPerIndex": lambda job: job["spec"].pop("backoffLimitPerIndex"),
    "which there is not": lambda job: rule(job).update(containerName="scorer"),
    "exit code 0": lambda job: rule(job).update(values=[0, 2]),
    "exit codes [3, 2]": lambda job: rule(job).update(values=[3, 2]),
    "selector": lambda job: job["spec"].update(selector={"matchLabels": {}}),
    "name 'Score'": lambda job: job["metadata"].update(name="Score"),
    "label value 'a b'": lambda job: job["metadata"]["labels"].update(a="a b"),
    "label value 1": lambda job: job["metadata"]["labels"].update(a=1),
    "'2 GB' is no quantity": lambda job: container(job)["resources"]["limits"].update(memory="2 GB"),
    "mountPath /runs comes twice": lambda job: container(job)["volumeMounts"].append(
        {"name": "tmp", "mountPath": "/runs"}
    ),
    "podReplacementPolicy Failed": lambda job: job["spec"].update(
        podReplacementPolicy="TerminatingOrFailed"
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_an_api_server_refuses_is_found(message: str) -> None:
    job = deepcopy(named(render("cpu"), "Job", "score"))
    BROKEN[message](job)
    assert message in " ".join(refusals(job))


@pytest.mark.parametrize(
    "change",
    [
        lambda pod: pod.pop("securityContext"),
        lambda pod: pod["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
        lambda pod: pod["initContainers"][0].pop("securityContext"),
        lambda pod: pod["containers"][0]["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]),
        lambda pod: pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        lambda pod: pod.update(hostNetwork=True),
    ],
)
def test_what_the_restricted_profile_forbids_is_found(change: Break) -> None:
    pod = deepcopy(named(render("cpu"), "Job", "train")["spec"]["template"]["spec"])
    assert not restricted(pod)
    change(pod)
    assert restricted(pod)


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


def deployment(documents: list[Manifest]) -> Manifest:
    return container(named(documents, "Deployment", "mlflow"))


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
    assert (failing["action"], failing["onExitCodes"]["values"]) == ("FailIndex", [2])
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


# Arguments, parsed by the programs' own parsers


def first_words(pod: Pod) -> set[str]:
    return {each["args"][0] for each in pod.spec["containers"] if each.get("args")}


def parse_torchrun(arguments: list[str], settings: Path) -> tuple[Any, TrainConfig]:
    launched = get_args_parser().parse_args(arguments)
    assert launched.training_script == "train/main.py"
    mounted = "--config=/etc/purebred/train.yaml"
    assert mounted in launched.training_script_args
    flags = [f"--config={settings}" if flag == mounted else flag for flag in launched.training_script_args]
    return launched, parse_config(flags)


@each_overlay
def test_every_containers_arguments_are_understood_by_the_program_it_starts(
    overlay: str, tmp_path: Path
) -> None:
    documents = render(overlay)
    settings = tmp_path / "train.yaml"
    settings.write_text(named(documents, "ConfigMap", "train-settings")["data"]["train.yaml"])
    started = set()
    for pod in jobs(overlay):
        for each in pod.containers:
            if each.get("command"):
                assert each["command"] == ["python", "train/sample.py"]
                continue
            action, *arguments = expand(each, documents)
            started.add(action)
            if action == "train":
                _, config = parse_torchrun(arguments, settings)
                assert (config.output, config.name) == ("/runs", "first")
                assert config.data.startswith("/data/")
            else:
                parsers[action]().parse_args(arguments)
    assert started == {"train", *parsers}


parsers = {
    "export": export.main.build_parser,
    "score": serve.main.build_parser,
    "merge": serve.merge.build_parser,
    "doctor": serve.doctor.build_parser,
}


@each_overlay
def test_a_step_reads_what_the_step_before_it_writes(overlay: str) -> None:
    documents = render(overlay)

    def parsed(name: str) -> Any:
        action, *arguments = expand(container(named(documents, "Job", name)), documents)
        return parsers[action]().parse_args(arguments)

    export_args, verify_args, score_args, merge_args = map(parsed, ("export", "verify", "score", "merge"))
    assert export_args.run == Path("/runs/first")
    assert verify_args.verify_provider == f"{score_args.provider}:{score_args.precision}"
    assert score_args.model == export_args.run / "export" / "model.onnx"
    assert Path(score_args.output) == merge_args.folder
    assert score_args.resume


@each_overlay
def test_numbers_that_belong_together_agree(overlay: str, tmp_path: Path) -> None:
    """Shards and completions; nodes, pods and Services; processes, GPUs, processors and batch size."""
    documents = render(overlay)
    settings = tmp_path / "train.yaml"
    settings.write_text(named(documents, "ConfigMap", "train-settings")["data"]["train.yaml"])
    score = named(documents, "Job", "score")["spec"]
    assert f"--shard=auto/{score['completions']}" in container({"spec": score})["args"]
    for pod in jobs(overlay):
        if "train" not in first_words(pod) or pod.owner.startswith("TrainingRuntime"):
            continue
        (work,), (doctor,) = pod.spec["containers"], pod.spec["initContainers"]
        torchrun, config = parse_torchrun(expand(work, documents)[1:], settings)
        processes = int(torchrun.nproc_per_node)
        nodes = int(torchrun.nnodes.partition(":")[0])
        checked = serve.doctor.build_parser().parse_args(expand(doctor, documents)[1:])
        assert checked.processes == processes
        assert config.batch_size % (processes * nodes) == 0
        limits = work["resources"]["limits"]
        assert processes <= quantity(limits["cpu"])
        assert limits.get("nvidia.com/gpu", processes) == processes
        assert checked.shm * 2**20 <= quantity(pod.spec["volumes"][2]["emptyDir"]["sizeLimit"])
        assert pod.job.get("completions", 1) == pod.job.get("parallelism", 1) == nodes
        if nodes > 1:
            assert torchrun.max_restarts == 0
            assert pod.job["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
            host, _, port = torchrun.rdzv_endpoint.partition(":")
            service = pod.spec["subdomain"]
            assert host == f"{pod.owner.removeprefix('Job/')}-0.{service}"
            assert checked.resolve == [host]
            assert int(port) in [p["port"] for p in named(documents, "Service", service)["spec"]["ports"]]


def test_the_train_job_sets_its_processes_and_leaves_pet_variables_to_the_controller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    documents = render("kubeflow")
    spec = named(documents, "TrainJob", "train")["spec"]
    assert isinstance(spec["trainer"]["numProcPerNode"], int)
    (pod,) = (pod for pod in pods(documents) if pod.owner.startswith("TrainingRuntime"))
    variables = {v["name"] for each in pod.containers for v in each.get("env", [])}
    assert not any(name.startswith("PET_") for name in variables)
    settings = tmp_path / "train.yaml"
    settings.write_text(named(documents, "ConfigMap", "train-settings")["data"]["train.yaml"])
    for name, value in {"NNODES": 2, "NPROC_PER_NODE": 2, "NODE_RANK": 1, "MASTER_PORT": 29400}.items():
        monkeypatch.setenv(f"PET_{name}", str(value))  # as the controller does
    torchrun, config = parse_torchrun(expand(pod.spec["containers"][0], documents)[1:], settings)
    assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.node_rank) == ("2", "2", 1)
    assert config.batch_size % 4 == 0


@each_overlay
def test_the_tracking_server_understands_its_arguments_and_answers_to_its_service_name(
    overlay: str,
) -> None:
    documents = render(overlay)
    server = deployment(documents)
    action, *arguments = expand(server, documents)
    context = mlflow.cli.cli.commands[action].make_context(action, arguments)
    hosts = context.params["allowed_hosts"].split(",")
    uri = named(documents, "ConfigMap", "pipeline")["data"]["MLFLOW_TRACKING_URI"]
    for host in (uri.removeprefix("http://"), "mlflow.purebred.svc.cluster.local:5000", "localhost:5000"):
        assert is_allowed_host_header(hosts, host)
    assert not is_allowed_host_header(hosts, "evil.example:5000")
    assert context.params["port"] == server["ports"][0]["containerPort"]


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


def test_the_dockerfile_and_the_scripts_pass_their_linters() -> None:
    programs = Path(sys.executable).parent
    for command in (
        [programs / "hadolint", K8S / "Dockerfile"],
        [programs / "shellcheck", *sorted(K8S.glob("*.sh"))],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


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
    assert "[parquet,cloud]" in stage

"""Kubernetes manifests for the tests: rendered, read strictly, and judged as an API server would.

`refusals` and `restricted` know part of what schemas cannot say (Kubernetes' validation.go of core, batch
and apps; the Pod Security Standards).
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

import k8s.runner.render
from k8s.runner.render import find_overlay

K8S = REPOSITORY / "k8s"
OVERLAYS = tuple(sorted(path.name for path in (K8S / "overlays").iterdir() if path.is_dir()))
Manifest = dict[str, Any]

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
SUBDOMAIN = re.compile(rf"{LABEL.pattern}(\.{LABEL.pattern})*")
SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1035
LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9])?")
LABEL_KEY = re.compile(rf"({SUBDOMAIN.pattern}/)?([A-Za-z0-9][-A-Za-z0-9_.]{{0,61}})?[A-Za-z0-9]")
QUANTITY = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(Ki|Mi|Gi|Ti|Pi|Ei|m|k|M|G|T|P|E|)")
POWERS = {"m": Decimal("0.001"), "": Decimal(1)}
POWERS |= {unit: Decimal(1000) ** (i + 1) for i, unit in enumerate("kMGTPE")}
POWERS |= {f"{unit}i": Decimal(1024) ** (i + 1) for i, unit in enumerate("KMGTPE")}


class StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Refuses a key that comes twice; kubectl keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"twice: {twice}", node.start_mark)
        return super().construct_mapping(node, deep)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, StrictLoader.construct_mapping)


def load(text: str) -> list[Any]:
    return [document for document in yaml.load_all(text, StrictLoader) if document is not None]


def kubectl() -> str:
    return str(Path(sys.executable).with_name("kubectl"))


@cache
def render(overlay: str) -> list[Manifest]:
    """Platform and Jobs of an overlay; shared by all tests: copy before you change it."""
    return [*render_folder(K8S / "overlays" / overlay / "platform"), *render_jobs(overlay)]


@cache
def render_jobs(overlay: str) -> list[Manifest]:
    return render_folder(K8S / "overlays" / overlay / "jobs")


def render_folder(folder: Path) -> list[Manifest]:
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"kustomize warns: {done.stderr}"
    return load(done.stdout)


def combine(base: str, components: tuple[str, ...], folder: Path, **fields: Any) -> list[Manifest]:
    """`base` (jobs, platform, overlays/NAME/jobs) with components in this order, as a user's overlay."""
    document = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(K8S / base, folder)],
        "components": [os.path.relpath(K8S / "components" / name, folder) for name in components],
        **fields,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(document))
    return render_folder(folder)


def for_run(overlay: str, run: str, *values: str) -> list[Manifest]:
    """The Jobs of an overlay for one run, as k8s/pipeline.py renders them, with values of `pipeline`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(kubectl()).parent}{os.pathsep}{os.environ['PATH']}")
        return k8s.runner.render.render(find_overlay(overlay), run, values, None, None).documents


def config(documents: list[Manifest], name: str) -> dict[str, str]:
    """Data of a generated ConfigMap, whose name ends in a hash."""
    (found,) = (
        d for d in documents if d["kind"] == "ConfigMap" and generated_as(d["metadata"]["name"], name)
    )
    data: dict[str, str] = found["data"]
    return data


def generated_as(name: str, config_map: str) -> bool:
    return re.fullmatch(rf"{config_map}(-[-a-z0-9]+)?-[a-z0-9]{{10}}", name) is not None


def named(documents: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name))
    return found


@dataclass(frozen=True)
class Pod:
    owner: str
    """Kind/name of what makes it."""
    job: Manifest
    """Job spec, or {} where none makes it."""
    labels: Mapping[str, str]
    spec: Manifest

    @property
    def containers(self) -> list[Manifest]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(documents: list[Manifest]) -> Iterator[Pod]:
    """Of all kinds that make pods; a TrainingRuntime's with what the TrainJob overrides."""
    for document in documents:
        owner, spec = f"{document['kind']}/{document['metadata']['name']}", document.get("spec", {})
        if document["kind"] in ("TrainingRuntime", "JobSet"):
            replicated = spec["template"]["spec"] if document["kind"] == "TrainingRuntime" else spec
            for job in replicated["replicatedJobs"]:
                template = job["template"]["spec"]["template"]
                yield Pod(owner, job["template"]["spec"], template["metadata"]["labels"], template["spec"])
        elif "template" in spec:
            template = spec["template"]
            job = spec if document["kind"] == "Job" else {}
            yield Pod(owner, job, template["metadata"].get("labels", {}), template["spec"])


def quantity(value: Any) -> Decimal:
    match = QUANTITY.fullmatch(str(value))
    if not match:
        raise ValueError(f"{value!r} is no quantity")
    return Decimal(match[1]) * POWERS[match[2]]


def refusals(document: Manifest) -> list[str]:
    """What an API server says no to although the schema has nothing against it."""
    metadata, kind = document["metadata"], document["kind"]
    pattern = SERVICE_NAME if kind == "Service" else SUBDOMAIN
    if kind in ("Job", "StatefulSet", "TrainJob"):
        pattern = LABEL  # becomes a label's value, and the pods' names
    found = [] if pattern.fullmatch(metadata["name"]) else [f"name {metadata['name']!r}"]
    found += label_refusals(metadata.get("labels", {}))
    if kind == "Job":
        found += job_refusals(document["spec"])
    if kind == "JobSet":
        found += jobset_refusals(document)
    if kind == "TrainingRuntime":  # becomes a JobSet, which the controller makes
        found += jobset_refusals({"metadata": metadata, **document["spec"]["template"]})
    if kind in ("Deployment", "StatefulSet"):
        spec = document["spec"]
        wanted = spec["selector"]["matchLabels"].items()
        if not wanted <= spec["template"]["metadata"].get("labels", {}).items():
            found.append("selector does not match the template's labels")
        if spec["template"]["spec"].get("restartPolicy", "Always") != "Always":
            found.append("restartPolicy must be Always")
    for pod in pods([document]):
        templates = document["spec"].get("volumeClaimTemplates", [])
        found += label_refusals(pod.labels)
        found += pod_refusals(pod.spec, {claim["metadata"]["name"] for claim in templates})
    return found


def label_refusals(labels: Mapping[str, Any]) -> list[str]:
    keys = [f"label key {key!r}" for key in labels if not LABEL_KEY.fullmatch(key)]
    values = labels.values()
    return keys + [
        f"label value {v!r}" for v in values if not (isinstance(v, str) and LABEL_VALUE.fullmatch(v))
    ]


def job_refusals(spec: Manifest) -> list[str]:
    found = []
    indexed = spec.get("completionMode") == "Indexed"
    policy = spec.get("podFailurePolicy")
    restart = spec["template"]["spec"].get("restartPolicy", "Always")
    if restart not in ("Never", "OnFailure"):
        found.append(f"restartPolicy {restart}")
    if "selector" in spec and not spec.get("manualSelector"):
        found.append("selector")
    if indexed and "completions" not in spec:
        found.append("Indexed without completions")
    for name in ("backoffLimitPerIndex", "successPolicy"):
        if name in spec and not indexed:
            found.append(f"{name} without Indexed")
    if "maxFailedIndexes" in spec:
        if "backoffLimitPerIndex" not in spec:
            found.append("maxFailedIndexes without backoffLimitPerIndex")
        if spec["maxFailedIndexes"] > spec.get("completions", 0):
            found.append("maxFailedIndexes above completions")
    if policy is not None:
        if restart != "Never":
            found.append("podFailurePolicy needs restartPolicy Never")
        if spec.get("podReplacementPolicy", "Failed") != "Failed":
            found.append("podFailurePolicy needs podReplacementPolicy Failed")
        for rule in policy["rules"]:
            found += rule_refusals(rule, spec)
    return found


RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
FAILURES = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded"}
FAILURES |= {"PodFailurePolicy"}


def jobset_refusals(document: Manifest) -> list[str]:
    """What the webhook of JobSet says no to."""
    found, spec, name = [], document["spec"], document["metadata"]["name"]
    before: list[str] = []
    for job in spec["replicatedJobs"]:
        found += [
            f"{job['name']} depends on {d['name']}"
            for d in job.get("dependsOn", [])
            if d["name"] not in before
        ]
        before.append(job["name"])
        template = job["template"]["spec"]
        last = f"{name}-{job['name']}-{job.get('replicas', 1) - 1}"
        pod = f"{last}-{template.get('completions', 1) - 1}-abcde"  # Indexed is the default
        found += [f"name {each!r}" for each in (last, pod) if not SERVICE_NAME.fullmatch(each)]
        found += job_refusals({"completionMode": "Indexed", "completions": 1, **template})
    rules = spec.get("failurePolicy", {}).get("rules", [])
    names = [rule["name"] for rule in rules]
    found += [
        f"rule name {each!r}" for each in names if not RULE_NAME.fullmatch(each) or names.count(each) > 1
    ]
    for rule in rules:
        unknown = {*rule.get("onJobFailureReasons", [])} - FAILURES
        unknown |= {*rule.get("targetReplicatedJobs", [])} - {*before}
        found += [f"rule {rule['name']} names {each}" for each in sorted(unknown)]
    return found


def rule_refusals(rule: Manifest, spec: Manifest) -> list[str]:
    found = []
    pod = spec["template"]["spec"]
    if ("onExitCodes" in rule) == ("onPodConditions" in rule):
        found.append("a rule has either onExitCodes or onPodConditions")
    if rule["action"] not in ("FailJob", "FailIndex", "Ignore", "Count"):
        found.append(f"action {rule['action']}")
    if rule["action"] == "FailIndex" and "backoffLimitPerIndex" not in spec:
        found.append("FailIndex without backoffLimitPerIndex")
    codes = rule.get("onExitCodes")
    if codes:
        names = {c["name"] for c in [*pod["containers"], *pod.get("initContainers", [])]}
        if codes.get("containerName") not in (None, *names):
            found.append(f"rule for container {codes['containerName']!r}, which there is not")
        values = codes["values"]
        if not values or values != sorted(set(values)) or not 0 <= min(values) <= max(values) <= 255:
            found.append(f"exit codes {values}")
        if codes["operator"] == "In" and 0 in values:
            found.append("exit code 0")
    for condition in rule.get("onPodConditions", []):
        if condition.get("status", "True") not in ("True", "False", "Unknown"):
            found.append(f"condition status {condition['status']!r}")
    return found


def pod_refusals(spec: Manifest, claims: set[str]) -> list[str]:
    found = []
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    containers = [*spec.get("initContainers", []), *spec["containers"]]
    names = [container["name"] for container in containers]
    for what in (volumes, names):
        found += [f"{name!r} comes twice" for name in set(what) if what.count(name) > 1]
        found += [f"name {name!r}" for name in what if not LABEL.fullmatch(name)]
    for volume in spec.get("volumes", []):
        if len(volume) != 2:
            found.append(f"volume {volume['name']} has {len(volume) - 1} sources")
        found += quantity_refusals({"sizeLimit": volume.get("emptyDir", {}).get("sizeLimit", 0)})
    for container in containers:
        mounts = container.get("volumeMounts", [])
        paths = [mount["mountPath"] for mount in mounts]
        found += [f"mountPath {path} comes twice" for path in set(paths) if paths.count(path) > 1]
        found += [
            f"mount of {m['name']!r} without a volume"
            for m in mounts
            if m["name"] not in {*volumes, *claims}
        ]
        found += resource_refusals(container)
        ports = {port.get("name") for port in container.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            port = container.get(probe, {}).get("httpGet", {}).get("port")
            if isinstance(port, str) and port not in ports:
                found.append(f"{probe} asks port {port!r}, which there is not")
    return found


def quantity_refusals(values: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in values.items():
        try:
            quantity(value)
        except ValueError as error:
            found.append(f"{name}: {error}")
    return found


def resource_refusals(container: Manifest) -> list[str]:
    requests, limits = (container.get("resources", {}).get(key, {}) for key in ("requests", "limits"))
    found = quantity_refusals(requests) + quantity_refusals(limits)
    if found:
        return found
    for name, value in requests.items():
        extended = "/" in name
        if extended and name not in limits:
            found.append(f"{name} is requested without a limit")
        elif name in limits and quantity(value) > quantity(limits[name]):
            found.append(f"{name}: limit {limits[name]} is below the request {value}")
        elif extended and quantity(value) != quantity(limits[name]):
            found.append(f"{name}: limit and request differ")
    return found


def restricted(spec: Manifest) -> list[str]:
    """What the Pod Security Standard `restricted` forbids: such a Job is accepted and never gets a pod."""
    pod = spec.get("securityContext", {})
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"}
    allowed |= {"projected", "secret", "name"}
    found += [f"volume {v['name']}" for v in spec.get("volumes", []) if not set(v) <= allowed]
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        own = container.get("securityContext", {})
        name = container["name"]
        if own.get("allowPrivilegeEscalation") is not False:
            found.append(f"{name}: allowPrivilegeEscalation")
        if own.get("privileged"):
            found.append(f"{name}: privileged")
        if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
            found.append(f"{name}: capabilities")
        if not own.get("runAsNonRoot", pod.get("runAsNonRoot")):
            found.append(f"{name}: runAsNonRoot")
        if own.get("runAsUser", pod.get("runAsUser")) == 0:
            found.append(f"{name}: runs as root")
        profile = own.get("seccompProfile", pod.get("seccompProfile", {}))
        if profile.get("type") not in ("RuntimeDefault", "Localhost"):
            found.append(f"{name}: seccompProfile")
        if any("hostPort" in port for port in container.get("ports", [])):
            found.append(f"{name}: hostPort")
    return found


def expand(
    container: Manifest, documents: list[Manifest], labels: Mapping[str, str] | None = None
) -> list[str]:
    """The arguments as the container gets them: $(NAME) from its environment. KeyError: there is none.

    `labels` are what controllers give the pod, for variables that are taken from one.
    """
    environment: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            environment |= named(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container.get("env", []):
        path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        label = re.fullmatch(r"metadata\.labels\['(.*)'\]", path)
        found = labels[label[1]] if label and labels is not None else "from-elsewhere"
        environment[variable["name"]] = variable.get("value", found)
    return [
        re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], argument)
        for argument in [*container.get("command", []), *container.get("args", [])]
    ]


def jobs(overlay: str) -> list[Pod]:
    """The pods of this project's own programs."""
    return [pod for pod in pods(render(overlay)) if pod.job]


def first_words(pod: Pod) -> set[str]:
    return {each["args"][0] for each in pod.spec["containers"] if each.get("args")}


def container(job: Manifest) -> Manifest:
    first: Manifest = job["spec"]["template"]["spec"]["containers"][0]
    return first


def deployment(documents: list[Manifest]) -> Manifest:
    return container(named(documents, "Deployment", "mlflow"))

"""What is found before anything starts: rights, and names that a pod would wait for in vain."""

import os
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

from k8s.runner.cluster import Cluster, KubectlError, Object, PipelineError
from k8s.runner.reasons import QUEUE, Watch
from k8s.runner.render import KINDS, Rendered, strings

SERVER_STARTS = 600.0  # seconds that a tracking server has to make its tables
RESOURCES = {"Job": "jobs.batch", "TrainJob": "trainjobs.trainer.kubeflow.org"}
RESOURCES["JobSet"] = "jobsets.jobset.x-k8s.io"


def check(cluster: Cluster, rendered: Rendered, steps: list[str]) -> None:
    """Raise PipelineError(2) with all that is missing, and with what to type."""
    jobs = [rendered.steps[step] for step in steps]
    documents = [*jobs, *(d for step in steps for d in rendered.beside(step))]
    check_rights(cluster, {job["kind"] for job in jobs})
    missing = [*missing_names(cluster, documents), *unbound_claims(cluster, documents)]
    if missing:
        raise refused(cluster, [*missing, *platform(rendered)])
    wait_for_server(cluster, rendered, jobs)


def refused(cluster: Cluster, missing: list[str]) -> PipelineError:
    return PipelineError(2, "\n  ".join([f"in namespace {cluster.namespace}:", *missing]))


def platform(rendered: Rendered) -> Iterator[str]:
    """Yield how to make what an overlay's Jobs use, where it has a platform."""
    folder = rendered.overlay.parent / "platform"
    if folder.is_dir():
        yield f"claims and services of this overlay: kubectl apply -k {os.path.relpath(folder)}"


def check_rights(cluster: Cluster, kinds: set[str]) -> None:
    """Refuse what would fail only after hours: the next step's Job, the end of a wait."""
    wanted = [(verb, RESOURCES[kind]) for kind in sorted(kinds) for verb in ("create", "delete", "patch")]
    if "TrainJob" in kinds:
        wanted.append(("create", "trainingruntimes.trainer.kubeflow.org"))
    for verb, resource in [*wanted, ("create", "configmaps"), ("list", "pods")]:
        try:
            cluster.call("auth", "can-i", verb, resource)
        except KubectlError as error:
            if not error.output.startswith("no"):
                raise
            hint = "; the role edit may" if resource == RESOURCES["Job"] else ""
            if error.says("warning"):  # there is no such kind in the cluster
                hint = f": {error}"
            where = f"in namespace {cluster.namespace}"
            raise PipelineError(2, f"you may not {verb} {resource} {where}{hint}") from None


def pod_specs(documents: list[Object]) -> Iterator[Object]:
    """Yield every pod specification in a document, whatever kind holds it."""
    for document in documents:
        values: list[object] = [document.get("spec")]
        while values:
            value = values.pop()
            if isinstance(value, list):
                values += value
            elif isinstance(value, dict):
                if "containers" in value and "volumes" in value:
                    yield value
                else:
                    values += value.values()


def needed(documents: list[Object]) -> dict[str, dict[str, str]]:
    """Return {resource: {name: how to make it}} of what pods name and nothing here makes."""
    found: dict[str, dict[str, str]] = {
        kind: {} for kind in ("persistentvolumeclaim", "secret", "configmap", "serviceaccount")
    }
    for spec in pod_specs(documents):
        for volume in spec["volumes"]:
            sources = [volume, *volume.get("projected", {}).get("sources", [])]
            for source in sources:
                if claim := source.get("persistentVolumeClaim"):
                    found["persistentvolumeclaim"][claim["claimName"]] = ""
                for kind, key in (("secret", "secretName"), ("configmap", "name")):
                    reference = source.get("configMap" if kind == "configmap" else kind)
                    if reference and not reference.get("optional"):
                        found[kind][reference.get(key) or reference["name"]] = ""
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            for variable in container.get("env", []):
                source = variable.get("valueFrom", {})
                for kind, key in (("secret", "secretKeyRef"), ("configmap", "configMapKeyRef")):
                    if (reference := source.get(key)) and not reference.get("optional"):
                        found[kind][reference["name"]] = reference["key"]
            for source in container.get("envFrom", []):
                for kind, key in (("secret", "secretRef"), ("configmap", "configMapRef")):
                    if (reference := source.get(key)) and not reference.get("optional"):
                        found[kind].setdefault(reference["name"], "")
        if account := spec.get("serviceAccountName"):
            found["serviceaccount"][account] = ""
    for document in documents:
        if document["kind"] == "ConfigMap":
            found["configmap"].pop(document["metadata"]["name"], None)
    return found


def exists(cluster: Cluster, resource: str, names: list[str]) -> set[str]:
    """Return those of the names that exist; all where this user may not look."""
    try:
        answer = cluster.call("get", resource, *names, "--ignore-not-found", "--output=name")
    except KubectlError as error:
        if error.forbidden:
            return set(names)
        raise
    return {line.partition("/")[2] for line in answer.splitlines()}


def missing_names(cluster: Cluster, documents: list[Object]) -> Iterator[str]:
    for resource, names in needed(documents).items():
        there = exists(cluster, resource, list(names)) if names else set()
        for name in sorted(set(names) - there):
            create = cluster.command(
                "create", "secret", "generic", name, f"--from-literal={names[name] or 'KEY'}=..."
            )
            yield f"{resource} {name} is missing" + (f": {create}" if resource == "secret" else "")
    queues = {d["metadata"].get("labels", {}).get(QUEUE) for d in documents if d["kind"] in KINDS} - {None}
    for queue in sorted(map(str, queues)):
        try:
            if not exists(cluster, "localqueues.kueue.x-k8s.io", [queue]):
                yield f"the queue {queue} is missing: an administrator makes a LocalQueue of that name"
        except KubectlError as error:
            if not error.says("have a resource type"):
                raise
            yield f"the queue {queue} is missing: Kueue is not installed"


def unbound_claims(cluster: Cluster, documents: list[Object]) -> Iterator[str]:
    """Yield claims that no pod can use: their class does not exist, or there is none."""
    for name in sorted(needed(documents)["persistentvolumeclaim"]):
        claim = None
        with suppress(KubectlError):
            claim = cluster.get(f"persistentvolumeclaim/{name}")
        if claim is None or claim.get("status", {}).get("phase") != "Pending":
            continue
        storage_class = claim["spec"].get("storageClassName")
        if storage_class and not exists(cluster, "storageclass", [storage_class]):
            yield f"claim {name} is not bound: there is no StorageClass {storage_class}"
            continue
        of_this = f"involvedObject.kind=PersistentVolumeClaim,involvedObject.name={name}"
        events: list[Object] = []
        with suppress(KubectlError):
            events = cluster.items("events", f"--field-selector={of_this}")
        for event in events:
            if event["reason"] == "FailedBinding" or "not found" in event.get("message", ""):
                message = event.get("message", "")
                yield f"claim {name} is not bound: {event['reason']}: {message}"
                break


def wait_for_server(cluster: Cluster, rendered: Rendered, jobs: list[Object]) -> None:
    """Wait for the platform's MLflow, where the steps use one that runs in this namespace."""
    if "$(MLFLOW_TRACKING_URI)" not in "".join(
        strings([jobs, [d for d in rendered.documents if d["kind"] == "TrainingRuntime"]])
    ):
        return
    name = urlsplit(rendered.values.get("MLFLOW_TRACKING_URI", "")).hostname or ""
    host, _, domain = name.partition(".")
    if domain not in ("", cluster.namespace) and not f"{domain}.".startswith(f"{cluster.namespace}.svc."):
        return  # a team's own of the same first name
    try:
        server = cluster.get(f"deployment/{host}") if host else None
    except KubectlError:
        server = None
    if server is None:
        return  # a team's own, elsewhere
    missing = list(missing_names(cluster, [server]))
    if missing:
        raise refused(cluster, missing)
    watch = Watch(cluster, host, "Deployment", server["metadata"]["uid"])
    watch.selector = ",".join(f"{k}={v}" for k, v in server["spec"]["selector"]["matchLabels"].items())
    end = cluster.now() + SERVER_STARTS
    while server is not None and not server.get("status", {}).get("availableReplicas"):
        if cluster.now() >= end:
            describe = cluster.command("describe", f"deployment/{host}")
            raise PipelineError(3, f"{host} is not available after {SERVER_STARTS:.0f} s: {describe}")
        watch.look(server, logs=False)
        cluster.sleep(5)
        server = cluster.get(f"deployment/{host}")

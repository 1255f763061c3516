"""What the status of a Job or pod tells of it, in the cluster's own words."""

from k8s.runner.cluster import Object

PASSING = ("ContainerCreating", "PodInitializing")


def lacks_pods(job: Object) -> bool:
    """Return whether a Job has fewer pods than it could have at once."""
    spec, status = job["spec"], job.get("status", {})
    left = spec.get("completions", 1) - status.get("succeeded", 0)
    return bool(status.get("active", 0) < min(spec.get("parallelism", 1), left))


def is_about(event: Object, pod: Object) -> bool:
    """Return whether an event is of a pod, or of a claim that the pod waits for before it has a node."""
    involved = event["involvedObject"]
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["spec"].get("volumes", [])
        if "persistentVolumeClaim" in volume and not pod["spec"].get("nodeName")
    ]
    of_claim = involved.get("kind") == "PersistentVolumeClaim" and involved.get("name") in claims
    return involved.get("uid") == pod["metadata"]["uid"] or of_claim


def how_far(pod: Object) -> str | None:
    """Return how far a pending pod has come of which the cluster prints no reason."""
    if not pod["spec"].get("nodeName"):
        return "no node yet"
    if any("running" in container.get("state", {}) for container in containers(pod)):
        return None
    return f"starts on node {pod['spec']['nodeName']}"


def containers(pod: Object) -> list[Object]:
    """Return the states of all containers, in the order in which they start."""
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def has_failed(pod: Object) -> bool:
    return pod["status"].get("phase") == "Failed" or any(
        state.get("terminated", {}).get("exitCode")
        for container in containers(pod)
        for state in (container.get("state", {}), container.get("lastState", {}))
    )


def why_failed(pod: Object) -> str:
    for container in containers(pod):
        for state in (container.get("state", {}), container.get("lastState", {})):
            if code := state.get("terminated", {}).get("exitCode"):
                reason = state["terminated"].get("reason", "Error")
                return f"container {container['name']} ended with exit code {code} ({reason})"
    status = pod["status"]
    return f"{status.get('reason', 'Failed')}: {status.get('message', '')}".strip(": ")


def why_waiting(pod: Object) -> str | None:
    """Return why a pod does not run, None where it does or has ended."""
    status = pod["status"]
    if status.get("phase") in ("Succeeded", "Failed"):
        return None
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"no node: {condition.get('reason', '')}: {condition.get('message', '')}"
    for container in containers(pod):
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason") not in PASSING:
            return f"waits: {waiting.get('reason', '')}: {waiting.get('message', '')}".rstrip(": ")
    ready = [c for c in status.get("conditions", []) if c["type"] == "Ready" and c["status"] != "True"]
    running = [c for c in status.get("containerStatuses", []) if "running" in c.get("state", {})]
    if not ready or not running or len(running) < len(status["containerStatuses"]):
        return None
    if all(container.get("ready", True) for container in running):  # as its node said last
        return f"runs on node {pod['spec'].get('nodeName')}, which does not answer"
    return "runs, and is not ready yet"

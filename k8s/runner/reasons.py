"""Why a Job's pods do not run, in the cluster's own words, and the last lines of those that failed."""

import sys
from collections.abc import Iterator
from contextlib import suppress

from k8s.runner.cluster import Cluster, KubectlError, Object, last_line, say

LOOK = 15.0  # seconds between two looks at the pods
REPEAT = 60.0  # seconds until an unchanged reason is printed again
LOST = 60.0  # seconds beyond its grace period after which a pod's node is taken to be gone
QUEUE = "kueue.x-k8s.io/queue-name"
PASSING = ("ContainerCreating", "PodInitializing")
# Events that repeat what a pod's own status has.
REPEATED = ("FailedScheduling", "BackOff", "Failed")
LABELS = {  # of the pods of each kind; a TrainJob's JobSet has its name
    "Job": "batch.kubernetes.io/job-name",
    "TrainJob": "jobset.sigs.k8s.io/jobset-name",
    "JobSet": "jobset.sigs.k8s.io/jobset-name",
}


def ending(live: Object) -> tuple[str, str] | None:
    """Return (Complete or Failed, reason and message), None while a Job, TrainJob or JobSet is active."""
    for condition in live.get("status", {}).get("conditions", []):
        kind = {"Completed": "Complete"}.get(condition["type"], condition["type"])
        if condition["status"] == "True" and kind in ("Complete", "Failed"):
            return kind, f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
    return None


class Watch:
    """The pods of one Job: what has been printed of them, and since when they are ending."""

    def __init__(self, cluster: Cluster, name: str, kind: str, uid: str) -> None:
        self.cluster, self.name, self.kind, self.uid = cluster, name, kind, uid
        self.selector = f"{LABELS.get(kind)}={name}"
        self.looked = cluster.now()
        self.printed: list[str] = []
        self.printed_at = 0.0
        self.ending_since: dict[str, float] = {}
        self.shown: set[str] = set()

    def of_this(self, kind: str) -> list[Object]:
        return self.cluster.items(kind, f"--selector={self.selector}")

    def pods(self) -> list[Object]:
        """Return the Job's pods."""
        return self.of_this("pods")

    def look(self, live: Object, logs: bool = True) -> None:
        """Print what the pods wait for, and of those that failed the last lines."""
        if self.cluster.now() - self.looked < LOOK:
            return
        self.looked = self.cluster.now()
        try:
            pods = self.pods()
            self.report([*self.why_none(live, pods), *self.why_each(pods)])
        except KubectlError as error:
            self.report([f"what it waits for cannot be read: {last_line(error)}"])
            return
        if logs:
            self.show_logs(pods)

    def report(self, lines: list[str]) -> None:
        """Print the reasons of this moment where they changed, else once a minute."""
        now = self.cluster.now()
        if lines != self.printed or (lines and now - self.printed_at >= REPEAT):
            for line in lines or ["no pod waits any more"]:
                say(f"{self.name}: {line}")
            self.printed, self.printed_at = lines, now

    def why_none(self, live: Object, pods: list[Object]) -> Iterator[str]:
        """Yield why there are fewer pods than there should be."""
        status, spec = live.get("status", {}), live["spec"]
        if live["metadata"].get("deletionTimestamp"):
            return
        if spec.get("suspend"):
            queue = live["metadata"].get("labels", {}).get(QUEUE)
            yield self.why_queued(queue) if queue else "suspended by somebody else"
            return
        expected = spec.get("parallelism", 1)
        if self.kind == "Job" and status.get("active", 0) + status.get("succeeded", 0) >= expected:
            return
        if self.kind != "Job" and pods:
            return
        owners = {self.uid}
        if self.kind in ("TrainJob", "JobSet"):  # the controller's own Jobs make the pods
            owners |= {job["metadata"]["uid"] for job in self.of_this("jobs")}
        messages = [e["message"] for e in self.events() if e["involvedObject"].get("uid") in owners]
        if messages:
            yield messages[-1]
        elif not pods:
            yield "it has no pod yet"

    def why_queued(self, queue: str) -> str:
        for workload in workloads(self.cluster, self.uid):
            for condition in workload.get("status", {}).get("conditions", []):
                if condition["type"] in ("QuotaReserved", "Admitted") and condition["status"] != "True":
                    return f"not admitted by the queue {queue}: {condition.get('message', '')}"
        return f"not admitted by the queue {queue} yet: {self.cluster.command('get', 'localqueue', queue)}"

    def why_each(self, pods: list[Object]) -> list[str]:
        """Return one line for each reason, with the pods that it holds for."""
        reasons: dict[str, list[str]] = {}
        events: list[Object] | None = None
        for pod in pods:
            reason = self.why_ending(pod) or why_waiting(pod)
            if reason is None and pod["status"].get("phase") == "Pending":
                events = self.events() if events is None else events
                uid = pod["metadata"]["uid"]
                messages = [
                    f"{e['reason']}: {e['message']}"
                    for e in events
                    if e["involvedObject"].get("uid") == uid and e["reason"] not in REPEATED
                ]
                reason = messages[-1] if messages else None
            if reason:
                reasons.setdefault(reason, []).append(pod["metadata"]["name"])
        return [
            f"pod {names[0]}: {reason}"
            if not names[1:]
            else f"{len(names)} pods, {names[0]} first: {reason}"
            for reason, names in sorted(reasons.items())
        ]

    def why_ending(self, pod: Object) -> str | None:
        """Return what to type where a pod that was deleted does not end: its node is gone."""
        metadata = pod["metadata"]
        if not metadata.get("deletionTimestamp"):
            return None
        now = self.cluster.now()
        since = self.ending_since.setdefault(metadata["uid"], now)
        if now - since < metadata.get("deletionGracePeriodSeconds", 30) + LOST:
            return "ending"
        node = pod["spec"].get("nodeName", "NODE")
        force = self.cluster.command("delete", "pod", metadata["name"], "--force", "--grace-period=0")
        return (
            f"does not end: node {node} does not answer, and the pod is replaced when it is gone. If "
            f"the machine is off for good, an administrator types: kubectl delete node {node} (or kubectl "
            f"taint node {node} node.kubernetes.io/out-of-service=gone:NoExecute); you can type: {force}"
        )

    def events(self) -> list[Object]:
        """Return the namespace's warnings, oldest first; none to those who may not read them."""
        found: list[Object] = []
        with suppress(KubectlError):
            found = self.cluster.items("events", "--field-selector=type=Warning")
        return sorted(found, key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or ""))

    def show_failure(self) -> None:
        """Print the last lines of pods that failed, where they can still be read."""
        with suppress(KubectlError):
            self.show_logs(self.pods())

    def show_logs(self, pods: list[Object]) -> None:
        """Print the last lines of pods that failed, each pod once, at most three at a time."""
        failed = [pod for pod in pods if has_failed(pod)]
        failed.sort(key=lambda pod: str(pod["metadata"].get("creationTimestamp")))
        for pod in failed[-3:]:
            name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
            if uid in self.shown:
                continue
            self.shown.add(uid)
            say(f"{self.name}: pod {name} failed: {why_failed(pod)}")
            try:
                # Without --ignore-errors, a container that never started hides what the doctor wrote.
                log = self.cluster.once(
                    *("logs", name, "--all-containers", "--ignore-errors", "--prefix", "--tail=20")
                )
            except KubectlError as error:
                log = last_line(error)
            print(log.rstrip(), file=sys.stderr, flush=True)


def workloads(cluster: Cluster, uid: str) -> list[Object]:
    """Return Kueue's Workloads of a Job; none without Kueue, and to those who may not read them."""
    found: list[Object] = []
    with suppress(KubectlError):
        found = cluster.items("workloads.kueue.x-k8s.io")
    return [
        workload
        for workload in found
        if any(owner["uid"] == uid for owner in workload["metadata"].get("ownerReferences", []))
    ]


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
    states = [container.get("state", {}) for container in status.get("containerStatuses", [])]
    if (
        ready
        and status.get("phase") == "Running"
        and states
        and all("running" in state for state in states)
    ):
        return f"runs on node {pod['spec'].get('nodeName')}, which does not answer"
    return None

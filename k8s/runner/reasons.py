"""Why a Job's pods do not run, in the cluster's own words, and the last lines of those that failed."""

import sys
from collections.abc import Iterator
from contextlib import suppress

from k8s.runner.cluster import Cluster, KubectlError, Object, last_line, say
from k8s.runner.pods import has_failed, how_far, is_about, lacks_pods, why_failed, why_waiting

LOOK = 15.0  # seconds between two looks at the pods
REPEAT = 60.0  # seconds until an unchanged reason is printed again
LOST = 60.0  # seconds beyond its grace period after which a pod's node is taken to be gone
QUEUE = "kueue.x-k8s.io/queue-name"
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
        self.restarts = 0

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
        restarts = live.get("status", {}).get("restarts", 0)
        if restarts > self.restarts:  # of a JobSet, whose failed pods are gone at once
            say(f"{self.name}: all its pods were started anew, {restarts} times until now")
        self.restarts = restarts
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
        if live["metadata"].get("deletionTimestamp"):
            if not pods:
                yield f"is being deleted, waits for {', '.join(live['metadata'].get('finalizers', []))}"
            return
        if live["spec"].get("suspend"):
            if queue := live["metadata"].get("labels", {}).get(QUEUE):
                yield self.why_queued(queue)
            else:
                yield f"suspended by somebody else, or by Kueue if it takes Jobs without the label {QUEUE}"
            return
        jobs = [live] if self.kind == "Job" else []
        if self.kind in ("TrainJob", "JobSet"):  # the controller's own Jobs make the pods
            jobs = self.of_this("jobs")
        if (jobs or pods) and not any(lacks_pods(job) for job in jobs):
            return
        owners = {self.uid, *(job["metadata"]["uid"] for job in jobs)}
        messages = [
            e.get("message", "")
            for e in self.events()
            if e["involvedObject"].get("uid") in owners or self.is_between(e["involvedObject"])
        ]
        if messages:
            yield messages[-1]
        elif not pods:
            yield "it has no pod yet"
        elif all(pod["status"].get("phase") in ("Succeeded", "Failed") for pod in pods):
            yield "no pod runs: the controller's pause before the next doubles with each that failed"

    def is_between(self, involved: Object) -> bool:
        """Return whether this is the JobSet or ReplicaSet that makes the pods, or the Jobs of them."""
        kind, name = involved.get("kind"), involved.get("name", "")
        if self.kind == "Deployment":
            return kind == "ReplicaSet" and name.rpartition("-")[0] == self.name
        return (kind, name) == ("JobSet", self.name)

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
                messages = [
                    f"{e.get('reason', '')}: {e.get('message', '')}"
                    for e in events
                    if is_about(e, pod) and e.get("reason") not in REPEATED
                ]
                reason = messages[-1] if messages else how_far(pod)
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

"""One step's Job in the cluster: made, waited for by its uid, stopped."""

import json
from dataclasses import dataclass, replace
from uuid import uuid4

from k8s.runner.cluster import (
    PATIENCE,
    Cluster,
    KubectlError,
    Object,
    PipelineError,
    as_list,
    last_line,
    say,
)
from k8s.runner.reasons import LABELS, QUEUE, Watch, ending, workloads
from k8s.runner.render import KINDS, SETTINGS, Rendered

POLL = 5.0  # seconds between two looks at a Job
TOKEN = "purebred/pipeline"  # annotation: which call of the pipeline made it
REPLACED = "purebred/replaced-by"  # annotation: which call of the pipeline deletes it


@dataclass(frozen=True)
class Job:
    """A Job, TrainJob or JobSet as it was made: another of the same name is another Job."""

    kind: str
    name: str
    uid: str
    attached: bool = False
    """Whether it existed before this call of the pipeline."""

    @property
    def path(self) -> str:
        return f"{KINDS[self.kind]}/{self.name}"


def as_job(live: Object) -> Job:
    return Job(live["kind"], live["metadata"]["name"], live["metadata"]["uid"])


def path_of(document: Object) -> str:
    return f"{KINDS[document['kind']]}/{document['metadata']['name']}"


def refuse_active(cluster: Cluster, rendered: Rendered, step: str, anew: bool, attach: bool) -> None:
    """Raise PipelineError(2) where the step's Job is active, without --replace and --attach."""
    document = rendered.steps[step]
    live = cluster.get(path_of(document))
    if live is None or ending(live) or anew:
        return
    name = live["metadata"]["name"]
    if not attach:
        raise PipelineError(
            2,
            f"{name} is active, made {live['metadata'].get('creationTimestamp')}: --attach waits for it, "
            "--replace deletes it and starts another; a run of another name is independent of it",
        )
    if not same_settings(live, rendered, step):
        raise PipelineError(2, f"--attach: {name} runs with other settings: give the same, or --replace")


def same_settings(live: Object, rendered: Rendered, step: str) -> bool:
    """Return whether a Job was made with the ConfigMaps that this call would make."""
    made_with = live["metadata"].get("annotations", {}).get(SETTINGS)
    return bool(made_with == rendered.steps[step]["metadata"]["annotations"][SETTINGS])


def start(cluster: Cluster, rendered: Rendered, step: str, anew: bool, attach: bool) -> Job:
    """Return the step's new Job, made after what it needs; with attach, the one that is active or complete.

    A finished Job of the same name is deleted first.
    """
    document = rendered.steps[step]
    refuse_active(cluster, rendered, step, anew, attach)
    live = cluster.get(path_of(document))
    if live and attach and same_settings(live, rendered, step):
        end = ending(live)
        if end is None or end[0] == "Complete":
            return resume(cluster, live)
    if live:
        claim(cluster, live, anew)
        remove(cluster, as_job(live))
    if beside := rendered.beside(step):
        try:
            cluster.call("apply", "--filename=-", given=as_list(beside))
        except KubectlError as error:
            raise PipelineError(error.code, f"{step}: {error}") from None
    return create(cluster, document)


def claim(cluster: Cluster, live: Object, anew: bool) -> None:
    """Mark a Job as the one to be deleted, which only one of several pipelines can.

    kubectl deletes by name: without this, a pipeline could delete what another has made in the meantime.
    """
    job, token = as_job(live), uuid4().hex
    for _ in range(20):  # the status of an active Job changes
        if REPLACED in live["metadata"].get("annotations", {}) and not anew:
            message = (
                f"another pipeline deletes {job.name}; if none does: {cluster.command('delete', job.path)}"
            )
            raise PipelineError(2, message)
        version = live["metadata"]["resourceVersion"]
        mark = {"metadata": {"resourceVersion": version, "annotations": {REPLACED: token}}}
        try:
            cluster.call("patch", job.path, "--type=merge", f"--patch={json.dumps(mark)}")
            return
        except KubectlError as error:
            if not error.says("conflict", "not found"):
                raise
        again = cluster.get(job.path)
        if again is None:
            return
        if as_job(again) != job:
            raise PipelineError(2, f"{job.name} is active: another pipeline has made it in this moment")
        live = again
    raise PipelineError(2, f"{job.name} changes faster than it can be deleted")


def create(cluster: Cluster, document: Object) -> Job:
    """Return the Job that the API server made; after a cut-off answer, look whether it did."""
    name, token, end = document["metadata"]["name"], uuid4().hex, cluster.now() + PATIENCE
    annotations = {**document["metadata"].get("annotations", {}), TOKEN: token}
    document = {**document, "metadata": {**document["metadata"], "annotations": annotations}}
    while True:
        try:
            answer = cluster.once("create", "--filename=-", "--output=json", given=json.dumps(document))
            made = json.loads(answer)
            break
        except KubectlError as error:
            # Webhooks of TrainJobs, Trainer's and Kueue's, see a runtime a moment after it was made.
            late = error.says("must be created before") or (
                error.says("trainjob.kb.io") and error.says("not found")
            )
            again = error.cut_off or late or error.says("already exists")
            if not again or cluster.now() >= end:
                raise PipelineError(3 if error.cut_off else 2, f"{name} cannot be made: {error}") from None
            say(f"{name}: not made yet, trying again: {last_line(error)}")
        live = cluster.get(path_of(document))
        if live and live["metadata"].get("annotations", {}).get(TOKEN) == token:
            made = live
            break
        if live:
            raise PipelineError(2, f"{name} is active: another pipeline has made it in this moment")
        cluster.sleep(POLL)
    say(f"{name}: started")
    return as_job(made)


def resume(cluster: Cluster, live: Object) -> Job:
    """Return an existing Job, which runs again if a time limit suspended it."""
    job = as_job(live)
    target, spec, off, on = brake(cluster, live)
    queued = QUEUE in live["metadata"].get("labels", {}) and target == job.path
    if not ending(live) and off.items() <= spec.items() and not queued:
        cluster.call("patch", target, "--type=merge", f"--patch={json.dumps({'spec': on})}")
    say(f"{job.name}: attached")
    return replace(job, attached=True)


def brake(cluster: Cluster, live: Object) -> tuple[str, Object, Object, Object]:
    """Return what suspends a Job: an object, its specification, and the fields that stop and resume.

    Kueue would start a Job again that it has admitted: its Workload is made inactive in place of that.
    """
    job = as_job(live)
    if workload := next(iter(workloads(cluster, job.uid)), None):
        name = f"workloads.kueue.x-k8s.io/{workload['metadata']['name']}"
        return name, workload["spec"], {"active": False}, {"active": True}
    return job.path, live["spec"], {"suspend": True}, {"suspend": False}


def follow(cluster: Cluster, document: Object) -> str:
    """Return the command that prints what all pods of a Job write."""
    of_this = f"{LABELS[document['kind']]}={document['metadata']['name']}"
    flags = "--follow --all-containers --ignore-errors --max-log-requests=50"
    return cluster.command("logs", flags, f"--selector={of_this}")


def remove(cluster: Cluster, job: Job) -> None:
    """Delete a Job and wait until its pods are gone, printing what they wait for."""
    cluster.call("delete", job.path, "--cascade=foreground", "--wait=false", "--ignore-not-found")
    watch = Watch(cluster, job.name, job.kind, job.uid)
    while (live := cluster.get(job.path)) is not None:
        if live["metadata"]["uid"] != job.uid:
            raise PipelineError(2, f"{job.name} was made again by somebody else")
        watch.look(live, logs=False)
        cluster.sleep(POLL)


def wait(cluster: Cluster, job: Job, timeout: float) -> None:
    """Return when the Job is complete.

    PipelineError: 1 where it failed, or was deleted or replaced; 3 where it has not ended within timeout
    seconds, after it was suspended.
    """
    watch = Watch(cluster, job.name, job.kind, job.uid)
    cluster.deadline = cluster.now() + timeout
    try:
        while not has_ended(cluster, job, watch):
            if cluster.now() >= cluster.deadline:
                raise PipelineError(
                    3, f"{job.name} has not ended within {timeout:.0f} s. {stop(cluster, job)}"
                )
            cluster.sleep(min(POLL, cluster.deadline - cluster.now()))
    finally:
        cluster.deadline = None


def has_ended(cluster: Cluster, job: Job, watch: Watch) -> bool:
    """Return whether the Job is complete; PipelineError(1) where it is not and will not be."""
    try:
        live = cluster.get(job.path)
    except KubectlError as error:  # a token that has expired: log in again in another shell
        watch.report([last_line(error)])
        return False
    describe = cluster.command("describe", job.path)
    if live is None:
        raise PipelineError(1, f"{job.name} was deleted by somebody else")
    if live["metadata"]["uid"] != job.uid:
        raise PipelineError(1, f"{job.name} was replaced by somebody else: {describe}")
    end = ending(live)
    if end and end[0] == "Complete":
        say(f"{job.name}: complete")
        return True
    if end:
        watch.show_failure()
        raise PipelineError(1, f"{job.name} failed: {end[1]}: {describe}")
    if live["metadata"].get("deletionTimestamp"):
        raise PipelineError(1, f"{job.name} is being deleted by somebody else: {describe}")
    watch.look(live)
    return False


def stop(cluster: Cluster, job: Job) -> str:
    """Suspend a Job and return what was done, and what a person can type."""
    delete = f"to give it up: {cluster.command('delete', job.path)}"
    target = job.path
    try:
        live = json.loads(cluster.once("get", job.path, "--output=json"))
        target, _, off, on = brake(cluster, live)
        if QUEUE in live["metadata"].get("labels", {}) and target == job.path:
            return f"It is left to its queue, as you may not read its Workload; {delete}"
        # Of another object of this name, the uid is refused.
        this = {"metadata": {"uid": job.uid}} if target == job.path else {}
        cluster.once("patch", target, "--type=merge", f"--patch={json.dumps({**this, 'spec': off})}")
    except KubectlError as error:
        return f"It continues, as {target} cannot be suspended ({last_line(error)}); {delete}"
    patch = json.dumps({"spec": on}, separators=(",", ":"))
    again = cluster.command("patch", target, "--type=merge", f"--patch='{patch}'")
    return f"It is suspended: its pods end, what they have saved is kept. To resume it: {again}; {delete}"

"""The judges of manifests.py: each thing that an API server refuses is found, so a pass means something."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import yaml
from manifests import (
    K8S,
    Manifest,
    container,
    load,
    named,
    refusals,
    render,
    render_folder,
    restricted,
)

Break = Callable[[Manifest], object]


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


def test_a_key_that_comes_twice_is_refused() -> None:
    with pytest.raises(yaml.YAMLError, match="twice"):
        load("a: 1\nb: {c: 1, c: 2}\n")


BROKEN_SETS: dict[str, Break] = {
    "export depends on verify": lambda s: s["spec"]["replicatedJobs"][1]["dependsOn"][0].update(
        name="verify"
    ),
    "rule name 'not-tried-again'": lambda s: s["spec"]["failurePolicy"]["rules"][0].update(
        name="not-tried-again"
    ),
    "names training": lambda s: s["spec"]["failurePolicy"]["rules"][1].update(
        targetReplicatedJobs=["training"]
    ),
    "names ExitCode": lambda s: s["spec"]["failurePolicy"]["rules"][0].update(
        onJobFailureReasons=["ExitCode"]
    ),
    "name 'chain-": lambda s: s["metadata"].update(name="chain-" + 50 * "a"),
    "exit code 0": lambda s: rule({"spec": s["spec"]["replicatedJobs"][1]["template"]["spec"]}).update(
        values=[0, 2]
    ),
}


@pytest.mark.parametrize("message", BROKEN_SETS)
def test_what_jobsets_webhook_refuses_is_found(message: str) -> None:
    (chain,) = (deepcopy(d) for d in render_folder(K8S / "examples" / "chain") if d["kind"] == "JobSet")
    assert refusals(chain) == []
    BROKEN_SETS[message](chain)
    assert message in " ".join(refusals(chain))

"""Strict schemas of two Kubernetes versions and of Kubeflow, with the judges of manifests.py."""

import json
from functools import cache
from typing import Any

import kubernetes_validate
from kubeflow_trainer_api import models
from manifests import Manifest, pods, refusals, restricted

VERSIONS = ("1.36", "1.37")
KUBEFLOW: dict[str, Any] = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "JobSet": models.JobsetV1alpha2JobSet,
}


def inner_job(document: Manifest) -> Manifest:
    """The one Job that a JobSet or a TrainingRuntime makes; the controllers make it Indexed."""
    spec = (
        document["spec"]["template"]["spec"] if document["kind"] == "TrainingRuntime" else document["spec"]
    )
    (replicated,) = spec["replicatedJobs"]
    assert replicated["name"] == "node"
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": document["metadata"]["name"]},
        "spec": replicated["template"]["spec"],
    }


def check(documents: list[Manifest]) -> None:
    assert {d["metadata"]["name"]: r for d in documents if (r := refusals(d))} == {}
    assert {pod.owner: r for pod in pods(documents) if (r := restricted(pod.spec))} == {}
    for document in documents:
        check_schema(json.dumps(document))


@cache
def check_schema(text: str) -> None:
    """Strict for each version; most documents of a combination are those of another."""
    document = json.loads(text)
    if document["kind"] in KUBEFLOW:
        assert KUBEFLOW[document["kind"]].from_dict(document).to_dict() == document
        if document["kind"] == "TrainJob":
            return
        document = inner_job(document)
        assert not refusals(document)
    for version in VERSIONS:
        # Of an unknown kind it prints a line and raises nothing.
        assert kubernetes_validate.validate(document, version, strict=True) == version
